"""Reading checkpoints back: complete, of this project, and without running what they hold."""

import datetime
import gc
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from bge_pruning.model_io.checkpoint import (
    BestScore,
    RunMetadata,
    build_l0_module,
    find_checkpoint,
    load_trained_model,
    read_best_score,
)
from bge_pruning.model_io.model_folder import round_weights
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.structural_pruning import PruningMasks, prune_embedding
from tests.common.code import Code
from tests.common.files import FOREIGN

NO_CHECKPOINT = r"x\.pt: damaged, not complete, or not a checkpoint of this project \(.+\)\. To fix"
NO_METADATA = (
    r"x\.pt: is not a checkpoint of this project: it holds no run metadata \(base_model, shape, "
    r".*tokenizer_files, revision, prompts, license, origin, refit_texts\)\. To fix, "
    r"choose a checkpoint"
)


@pytest.fixture
def content(metadata, build_checkpoint) -> dict[str, Any]:
    return build_checkpoint(metadata)


@pytest.fixture
def save(tmp_path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        torch.save(content, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    return write


def describe(content: dict[str, Any], metadata: RunMetadata) -> None:
    """Put other metadata into a checkpoint."""
    content["state"]["callbacks"] = [("RunMetadataCallback", metadata.state_dict())]


def test_metadata_comes_back(metadata, tmp_path):
    """An empty ``added_tokens.json`` must not stop a run at its first checkpoint."""
    files = {"sentencepiece.bpe.model": bytes(range(256)), "added_tokens.json": b""}
    odd = replace(
        metadata,
        base_model="kém/模型 'x'",
        revision="5617a9f",
        license="apache-2.0",
        origin="owner/模型",
        source_pruning={"kept": {"hidden": [0, 2]}, "seed": 1},
        tokenizer_files={**metadata.tokenizer_files, **files},
    )
    for given in (odd, replace(metadata, l0_module=None)):  # as of a run without gates
        torch.save(given.state_dict(), tmp_path / "x.pt")
        found = torch.load(tmp_path / "x.pt", weights_only=True)
        assert RunMetadata.from_state_dict(found) == given

    # Of before there was one of these keys.
    state = metadata.state_dict()
    for new in ("revision", "prompts", "license", "origin"):
        old = {key: value for key, value in json.loads(state["json"]).items() if key != new}
        assert RunMetadata.from_state_dict({**state, "json": json.dumps(old)}) == metadata


def test_a_run_folder_means_its_newest_checkpoint_or_the_best_if_asked_for(content, save, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(save(content), run / "ba12-rank0.pt")
    (run / "ba8-rank0.pt").write_bytes(b"older")
    (run / "latest-rank0.pt").symlink_to("ba12-rank0.pt")
    assert find_checkpoint(run).resolve() == (run / "ba12-rank0.pt").resolve()
    assert find_checkpoint(run / "ba8-rank0.pt") == run / "ba8-rank0.pt"
    assert load_trained_model(find_checkpoint(run)).batch == 12
    message = re.escape(f"{run}: holds no best-rank0.pt. To fix, name the folder of a run with ")
    with pytest.raises(FileNotFoundError, match=f"{message}evaluation.keep_best .* leave out"):
        find_checkpoint(run, best=True)
    with pytest.raises(FileNotFoundError, match=r"ba12-rank0\.pt: holds no best-rank0\.pt"):
        find_checkpoint(run / "ba12-rank0.pt", best=True)
    with pytest.raises(FileNotFoundError, match=r"none: no such run folder or checkpoint"):
        find_checkpoint(tmp_path / "none", best=True)
    (run / "best-rank0.pt").write_bytes(b"")
    assert find_checkpoint(run, best=True) == run / "best-rank0.pt"
    assert find_checkpoint(run / "best-rank0.pt") == run / "best-rank0.pt"
    assert find_checkpoint(run).resolve().name == "ba12-rank0.pt"


def test_a_run_folder_without_checkpoint_and_a_missing_one(tmp_path):
    message = r"holds no latest-rank0\.pt, so no checkpoint was saved\. To fix, choose the folder"
    for _ in ("empty", "link to nothing"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + ": " + message):
            find_checkpoint(tmp_path)
        if not (tmp_path / "latest-rank0.pt").is_symlink():
            (tmp_path / "latest-rank0.pt").symlink_to("gone.pt")
    message = r"nöne\.pt: no such run folder or checkpoint\. To fix, check the path"
    with pytest.raises(FileNotFoundError, match=message):
        find_checkpoint(tmp_path / "nöne.pt")


def test_what_the_best_checkpoint_is_the_best_by(content, save):
    best = {"metric": "docs/ndcg_at_10", "score": 0.5, "batch": 3}
    assert read_best_score(save({**content, "best": best})) == BestScore(**best)
    message = r"does not say what it is the best by \(KeyError\('best'\)\)\. To fix, remove it"
    with pytest.raises(ValueError, match=message):
        read_best_score(save(content))
    with pytest.raises(ValueError, match=r"does not say what it is the best by \(TypeError"):
        read_best_score(save({**content, "best": {"score": 0.5}}))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_outputs_come_back(pooling, metadata, build_checkpoint, build_model, save, batch):
    shape = EncoderShape(**metadata.shape)
    backbone, heads = build_model(shape, torch.float32, pooling)
    read = load_trained_model(save(build_checkpoint(replace(metadata, pooling=pooling))))
    with torch.no_grad():
        hidden = backbone(**batch)
        mine = read.backbone(**batch)
        assert torch.equal(mine, hidden)
        outputs = read.heads.outputs(mine, batch["attention_mask"])
        for name, expected in heads.outputs(hidden, batch["attention_mask"]).items():
            assert torch.equal(outputs[name], expected)
    assert set(outputs) == {"dense_vecs", "token_weights", "colbert_vecs"}
    assert read.shape == shape
    assert read.metadata.pooling == pooling
    assert read.batch == 12
    assert not any(m.training for m in (read.backbone, read.heads, read.l0_module))


def test_gates_come_back_and_those_of_a_budget_are_built(metadata, content, save, tiny_shape):
    names = [name for name in content["state"]["model"] if name.startswith("l0_module.")]
    generator = torch.Generator().manual_seed(1)
    for name in names:
        shape = content["state"]["model"][name].shape
        content["state"]["model"][name] = torch.randn(shape, generator=generator)
    read = load_trained_model(save(content)).l0_module
    assert read.axes == ("head", "hidden", "intermediate", "layer")
    assert read.realised_shape() == EncoderShape(**metadata.l0_module["target"])
    assert {f"l0_module.{name}" for name in read.state_dict()} == set(names)
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, content["state"]["model"][f"l0_module.{name}"])
    arguments = {**metadata.l0_module, "target": None, "target_parameters": 20000.0, "seed": 9}
    built = build_l0_module(tiny_shape, arguments)
    expected = L0Module(tiny_shape, metadata.l0_module["axes"], None, 20000.0, seed=9)
    assert built.target is None and built.target_parameters == 20000.0
    assert torch.equal(built.log_alpha["hidden"], expected.log_alpha["hidden"])
    assert isinstance(built.deterministic_masks(), PruningMasks)


def test_a_run_without_gates_and_heads_or_with_another_config(
    metadata, build_checkpoint, save, tiny_hf_config, tiny_shape
):
    config = {**tiny_hf_config, "pad_token_id": 5, "layer_norm_eps": 1e-2}
    read = load_trained_model(save(build_checkpoint(replace(metadata, hf_config=config))))
    assert read.backbone.embeddings.pad_token_id == 5
    norms = [m for m in read.backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-2}
    shape = replace(tiny_shape, sparse_head=False, colbert_dim=0, pooler=False)
    bare = replace(metadata, shape=asdict(shape), l0_module=None)
    read = load_trained_model(save(build_checkpoint(bare)))
    assert read.l0_module is read.heads.sparse_linear is read.heads.colbert_linear is None
    assert not any("pooler" in name for name in read.backbone.state_dict())


def test_what_else_composer_stores_is_allowed_and_the_optimizer_not_read(content, save):
    content["rng"] = [{"numpy": np.random.RandomState(0).get_state(), "python": (3, (1, 2), None)}]
    content["state"]["timestamp"]["Timestamp"]["total_wct"] = datetime.timedelta(seconds=3)
    content["state"]["integrations"] = {"torch": torch.torch_version.TorchVersion("2.7.0")}
    assert load_trained_model(save(content)).batch == 12
    content["state"]["optimizers"] = {"AdamW": {"state": {"w": torch.ones(2**24)}}}  # 64 MiB
    path = save(content)
    load_trained_model(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what there is now
    before = psutil.Process().memory_info().rss
    read = load_trained_model(path)
    sum(float(p.detach().sum()) for p in read.backbone.parameters())
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert peak - before < 2**25


def mappings(path: Path) -> int:
    """How often a file is mapped into this process."""
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.endswith(str(path)) for line in lines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_left_without_weights_or_in_another_precision(dtype, content, save):
    weights = {name: tensor.to(dtype) for name, tensor in content["state"]["model"].items()}
    content["state"]["model"] = weights
    read = load_trained_model(save(content))
    for prefix in ("backbone", "heads", "l0_module"):
        for name, tensor in getattr(read, prefix).state_dict().items():
            assert tensor.device.type == "cpu" and tensor.is_contiguous(), name
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, weights[f"{prefix}.{name}"].float()), name
    frozen = {name for name, p in read.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}


def test_memory_is_given_back_and_the_checkpoint_left_alone(content, save):
    path = save(content)
    read = load_trained_model(path)
    assert mappings(path) == 2
    prune_embedding(read.backbone.embeddings.word_embeddings, [0, 3])
    assert mappings(path) == 1
    del read
    assert mappings(path) == 0
    before = path.read_bytes()
    read = load_trained_model(path)
    round_weights(read.backbone, read.heads, torch.bfloat16)
    for module in (read.backbone, read.heads, read.l0_module):
        for parameter in module.parameters():
            parameter.data.zero_()
    assert path.read_bytes() == before


FOREIGN_CHECKPOINTS = {
    **FOREIGN,
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle of nothing": b"\x80\x02.",
    "pickle of what is not there": b"\x80\x02h\x00.",
}


@pytest.mark.parametrize("damage", [0.0, 0.001, 0.1, 0.5, 0.99, 0.9999, *FOREIGN_CHECKPOINTS])
def test_truncated_and_other_files(damage, content, save):
    """A share of the file, or what another program wrote."""
    path = save(content)
    whole = path.read_bytes()
    if isinstance(damage, float):
        path.write_bytes(whole[: int(damage * len(whole))])
    else:
        path.write_bytes(FOREIGN_CHECKPOINTS[damage])
    with pytest.raises(ValueError, match=NO_CHECKPOINT) as caught:
        load_trained_model(path)
    # Torch's own words advise to switch the protection off, or to save the file in another way.
    assert "weights_only" not in str(caught.value)
    assert "torch.save(" not in str(caught.value)


@pytest.mark.parametrize("place", ["top", "metadata", "weights"])
def test_code_is_named_and_not_run(place, content, save, tmp_path):
    """And nobody is advised to run it, as Torch's own words do."""
    code = Code(tmp_path / "ran")
    if place == "top":
        content["extra"] = code
    elif place == "metadata":
        content["state"]["callbacks"][0][1]["json"] = code
    else:
        content["state"]["model"]["backbone.pooler.dense.bias"] = code
    path = save(content)
    with pytest.raises(ValueError, match=NO_CHECKPOINT) as caught:
        load_trained_model(path)
    assert "mkdir" in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"embeddings.word_embeddings.weight": torch.ones(2, 2)},
        {"state": {"model": {}, "callbacks": [("NaNMonitor", {})]}},
        {"state": {"model": {}, "callbacks": [1, 2]}},
        {"state": {"model": {}}},
        {"state": torch.ones(2)},
        {"state": None},
        [1, 2],
        torch.ones(2),
        None,
    ],
    ids=str,
)
def test_other_projects(other, save):
    with pytest.raises(ValueError, match=NO_METADATA):
        load_trained_model(save(other))


def test_damaged_metadata_or_a_part_that_is_missing(content, save):
    for state in (
        None,
        {},
        {"json": "{}", "tokenizer_files": {}},
        {"json": "{", "tokenizer_files": {}},
        {"json": "[]", "tokenizer_files": {}},
        {"json": "{}", "tokenizer_files": {"tokenizer.json": "text"}},
        {"json": "{}", "tokenizer_files": None},
    ):
        damaged = {**content["state"], "callbacks": [("RunMetadataCallback", state)]}
        with pytest.raises(ValueError, match=NO_METADATA):
            load_trained_model(save({**content, "state": damaged}))
    for part in ("model", "timestamp"):
        state = {key: value for key, value in content["state"].items() if key != part}
        with pytest.raises(ValueError, match=r"x\.pt: .*(damaged|not a checkpoint).* To fix"):
            load_trained_model(save({**content, "state": state}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": {"hidden_size": 32, "size_of_tomorrow": 1}}, "has no shape.num_attention_heads"),
        ({"hf_config": {}}, "has no hf_config.pad_token_id"),
        (
            {"l0_module": {"axes": ["layer"], "target": None, "axis_of_tomorrow": 1}},
            "has no l0_module.target_parameters, l0_module.seed",
        ),
        ({"base_model": None}, "base_model is null, expected a text"),
        ({"pooling": "max"}, 'pooling is "max", expected one of cls, mean'),
        ({"tokenizer_files": {}}, r"has no tokenizer\.json"),
        (
            {"hf_config": {"pad_token_id": 99, "layer_norm_eps": 1e-5}},
            "pad_token_id 99 is not one of the 99 tokens",
        ),
    ],
    ids=["shape", "hf_config", "l0_module", "base_model", "pooling", "tokenizer_files", "pad"],
)
def test_metadata_of_another_version(change, message, metadata, content, save):
    """Read well, but it does not say what this version asks for."""
    describe(content, replace(metadata, **change))
    found = rf"x\.pt: run metadata: {message}.* To fix, use an earlier checkpoint, or extract with"
    with pytest.raises(ValueError, match=found):
        load_trained_model(save(content))


def test_gates_and_sizes_of_another_version_or_run(metadata, content, save, target_shape):
    gates = {"axes": ["layer"], "target": None, "target_parameters": 1e4, "seed": 1, "later": 2}
    describe(content, replace(metadata, l0_module=gates))
    message = r"x\.pt: run metadata: these gates are not of this version .* To fix, extract with"
    with pytest.raises(ValueError, match=message):
        load_trained_model(save(content))
    shape = {**metadata.shape, "num_hidden_layers": 10**9}
    describe(content, replace(metadata, shape=shape))
    with pytest.raises(ValueError, match=r"num_hidden_layers is 1000000000, expected .* 1 to 1000"):
        load_trained_model(save(content))
    target = asdict(replace(target_shape, num_hidden_layers=4))
    other = {**metadata.l0_module, "axes": ["head", "hidden", "intermediate"], "target": target}
    describe(content, replace(metadata, l0_module=other))
    with pytest.raises(ValueError, match=r"\(l0_module\): .*only in checkpoint: lambda_1\.layer"):
        load_trained_model(save(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, r"\(backbone\): .*only in model: encoder\.layer\.4\."),
        ({"colbert_dim": 16}, r"\(heads\): .*colbert_linear\.weight is \(32, 32\).*\(16, 32\)"),
        ({"sparse_head": False}, r"\(heads\): .*only in checkpoint: sparse_linear\."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_another_model(change, message, metadata, content, save, tiny_shape):
    # Not the gates: their own arguments name no sizes but the target's.
    shape = asdict(replace(tiny_shape, **change))
    describe(content, replace(metadata, shape=shape, l0_module=None))
    expected = r"x\.pt .*checkpoint and model disagree: .*To fix, use the weights and the config"
    with pytest.raises(ValueError, match=expected) as caught:
        load_trained_model(save(content))
    assert re.search(message, str(caught.value))
