"""From a checkpoint to a folder: the same outputs, the right structures, all or nothing."""

import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bge_pruning.evaluation.evaluate import size_on_disk
from bge_pruning.export import extraction
from bge_pruning.export.extract import ExtractOptions
from bge_pruning.export.extraction import describe
from bge_pruning.export.model_card import render_model_card
from bge_pruning.export.pruning_record import compute_constraint_report
from bge_pruning.export.validation import ValidationError
from bge_pruning.model_io.checkpoint import RunMetadata
from bge_pruning.model_io.projection import compute_modules
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.structural_pruning import PruningMasks
from bge_pruning.reports.report_tables import render_bytes
from bge_pruning.utils.records import PruningRecord
from tests.common.files import edit_json
from tests.common.formulas import compute_outputs
from tests.common.trainings import extract_json as extract

ALL = ("head", "hidden", "intermediate", "layer")
SIZES = {
    "head": ("num_attention_heads", 2),
    "hidden": ("hidden_size", 16),
    "intermediate": ("intermediate_size", 32),
    "layer": ("num_hidden_layers", 2),
}
# sigmoid(log_alpha + SHIFT) is the probability of an open gate.
SHIFT = -2 / 3 * math.log(0.1 / 1.1)


@pytest.fixture
def gated(metadata, tiny_shape) -> Callable[..., RunMetadata]:
    """A function that gives the metadata of a run with these axes gated, each to half."""

    def gated(axes: tuple[str, ...] = ALL, **changes: Any) -> RunMetadata:
        target = replace(tiny_shape, **dict(SIZES[axis] for axis in axes))
        arguments = {**metadata.l0_module, "axes": list(axes), "target": asdict(target)}
        return replace(metadata, l0_module=arguments, **changes)

    return gated


def gates_of(run: Path) -> dict[str, list]:
    state = torch.load(run / "latest-rank0.pt", weights_only=True)["state"]["model"]
    prefix = "l0_module.log_alpha."
    return {n.removeprefix(prefix): t.tolist() for n, t in state.items() if n.startswith(prefix)}


def largest(values: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def kept_of(run: Path, shape: EncoderShape) -> dict[str, list]:
    """The structures with the largest gates, by hand."""
    gates = gates_of(run)
    layers = largest(gates["layer"], shape.num_hidden_layers) if "layer" in gates else range(4)
    kept = {"layer": list(layers), "hidden": list(range(32))}
    if "hidden" in gates:
        kept["hidden"] = largest(gates["hidden"], shape.hidden_size)
    for axis, size, count in (
        ("head", 4, shape.num_attention_heads),
        ("intermediate", 64, shape.intermediate_size),
    ):
        rows = gates.get(axis, [[0.0] * size] * 4)
        kept[axis] = [largest(rows[layer], count) for layer in layers]
    return kept


def masks_of(kept: dict[str, list]) -> PruningMasks:
    head, intermediate = torch.zeros(4, 4), torch.zeros(4, 64)
    for row, layer in enumerate(kept["layer"]):
        head[layer, kept["head"][row]] = 1.0
        intermediate[layer, kept["intermediate"][row]] = 1.0
    layer = torch.zeros(4).index_fill(0, torch.tensor(kept["layer"]), 1.0)
    hidden = torch.zeros(32).index_fill(0, torch.tensor(kept["hidden"]), 1.0)
    return PruningMasks(head, intermediate, layer, hidden)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "cut_axes",
    [ALL, ("layer",), ("intermediate",), ("head", "hidden"), ("head", "hidden", "intermediate")],
    ids="-".join,
)
def test_masked_equals_extracted(
    cut_axes, pooling, gated, save_run, build_model, tiny_shape, batch, tmp_path
):
    run = save_run(gated(cut_axes, pooling=pooling))
    info = extract(run, tmp_path / "small")
    shape = replace(tiny_shape, **dict(SIZES[axis] for axis in cut_axes))
    kept = kept_of(run, shape)
    assert info["kept"] == kept
    assert info["shape"] == asdict(shape)
    backbone, heads = build_model(tiny_shape, torch.float32, pooling)
    with torch.no_grad():
        hidden = backbone(**batch, masks=masks_of(kept))
        masked = heads.outputs(hidden, batch["attention_mask"])
    masked["last_hidden_state"] = (hidden * batch["attention_mask"][..., None])[..., kept["hidden"]]
    masked["dense_vecs"] = masked["dense_vecs"][:, kept["hidden"]]
    extracted = compute_outputs(tmp_path / "small", pooling, batch)
    assert extracted.keys() == masked.keys()
    for name, value in extracted.items():
        torch.testing.assert_close(value, masked[name], atol=1e-5, rtol=0)
    assert info["largest_difference"] <= 1e-5


@pytest.mark.parametrize(
    "change",
    [{"pooler": False}, {"sparse_head": False}, {"colbert_dim": 0}, {"colbert_dim": 8}],
    ids=lambda change: next(iter(change.items())),
)
def test_models_with_other_outer_parts(change, gated, save_run, tiny_shape, tmp_path):
    shape = replace(tiny_shape, **change)
    metadata = gated()
    target = {**metadata.l0_module["target"], **change}
    metadata = replace(
        metadata, shape=asdict(shape), l0_module={**metadata.l0_module, "target": target}
    )
    info = extract(save_run(metadata), tmp_path / "small")
    assert_counts(tmp_path / "small", info["parameters"]["extracted"])


@pytest.mark.parametrize("length", [8, 16])
def test_what_the_source_says_is_kept(length, metadata, save_run, tiny_hf_config, tmp_path):
    """Its tokenizer pads as all-MiniLM-L6-v2's; texts that it cuts make no difference."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_str(metadata.tokenizer_files["tokenizer.json"].decode())
    tokenizer.enable_padding(length=60, pad_id=1, pad_token="<pad>")
    tokenizer.enable_truncation(60)
    files = {**metadata.tokenizer_files, "tokenizer.json": tokenizer.to_str().encode()}
    run = save_run(
        replace(
            metadata,
            hf_config={**tiny_hf_config, "layer_norm_eps": 0.1},
            tokenizer_files=files,
            prompts={"prompts": {"query": "the plane: "}, "default_prompt_name": "query"},
            max_seq_length=length,
        )
    )
    small = tmp_path / "small"
    extract(run, small)
    assert json.loads((small / "config.json").read_text())["layer_norm_eps"] == 0.1
    stored = {**json.loads(files["tokenizer.json"]), "truncation": None, "padding": None}
    assert json.loads((small / "tokenizer.json").read_text()) == stored
    assert AutoTokenizer.from_pretrained(small).model_max_length == length
    model = SentenceTransformer(str(small), device="cpu")
    assert (model.prompts["query"], model.default_prompt_name) == ("the plane: ", "query")
    assert (model.max_seq_length, model.similarity_fn_name) == (length, "cosine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masked_and_rounded_equals_extracted(
    dtype, run, build_model, tiny_shape, target_shape, batch, tmp_path
):
    """The law for rounded weights: 1e-5, as far as float32 goes; bfloat16 itself is far above."""
    info = extract(run, tmp_path / "small", options=ExtractOptions(dtype))
    kept = kept_of(run, target_shape)
    assert info["kept"] == kept
    backbone, heads = build_model(tiny_shape, torch.float32)
    found = []
    for rounded in (False, True):
        if rounded:
            for parameter in (*backbone.parameters(), *heads.parameters()):
                parameter.data = parameter.data.to(dtype).float()
        with torch.no_grad():
            hidden = backbone(**batch, masks=masks_of(kept))
            masked = heads.outputs(hidden, batch["attention_mask"])
        found.append({**masked, "dense_vecs": masked["dense_vecs"][:, kept["hidden"]]})
    small = tmp_path / "small"
    heads = {p.stem: torch.load(p, weights_only=True) for p in small.glob("*.pt")}
    assert all(t.dtype == dtype for state in heads.values() for t in state.values())
    for name, state in heads.items():
        torch.save({key: value.float() for key, value in state.items()}, small / f"{name}.pt")
    extracted = compute_outputs(small, "cls", batch)
    for name, value in found[1].items():
        torch.testing.assert_close(extracted[name], value, atol=1e-5, rtol=0)
    assert (found[0]["dense_vecs"] - found[1]["dense_vecs"]).abs().max() > 1e-5
    assert info["largest_difference"] <= 1e-5
    precision = info["precision"]
    assert set(precision) == {"dtype", "rounding", "as_loaded"}
    name = str(dtype).removeprefix("torch.")
    assert precision["dtype"] == name
    outputs = {"dense_vecs", "token_weights", "colbert_vecs"}
    assert set(precision["rounding"]) == {"dense_cosine", *outputs}
    assert 1e-5 < precision["rounding"]["dense_vecs"] < 0.1
    assert 0.99 < precision["rounding"]["dense_cosine"] < 1.0
    assert 1e-5 < precision["as_loaded"] < 0.1
    card = (small / "README.md").read_text(encoding="utf-8")
    assert f"The weights are {name}:" in card


def test_numbers_beyond_float16_are_refused(run, metadata, save_run, refuses, tmp_path):
    """Of the second model no weight is too large, but what they compute is."""
    name = "encoder.layer.2.output.dense.bias"
    save_run(metadata, {f"backbone.{name}": torch.full((32,), 1e5)})
    refuses(
        ValueError, rf"^{name} holds 100000, and float16 ends at 65504", run, dtype=torch.float16
    )
    names = [f"backbone.encoder.layer.{i}.intermediate.dense.bias" for i in range(4)]
    save_run(metadata, {name: torch.full((64,), 6e4) for name in names})
    extract(run, tmp_path / "wide", options=ExtractOptions(torch.bfloat16))
    message = r"^run in float16, the extracted model gives vectors that are not finite: .* To fix"
    refuses(ValidationError, message, run, dtype=torch.float16)


def assert_counts(folder: Path, counts: dict[str, int]) -> None:
    """Counts against the numbers that the files hold."""
    state = load_file(folder / "model.safetensors")
    real = {
        part: sum(t.numel() for name, t in state.items() if name.startswith(f"{part}."))
        for part in ("encoder", "embeddings", "pooler")
    }
    heads = [torch.load(path, weights_only=True) for path in folder.glob("*.pt")]
    # A view would carry the whole of what it was cut from into the file.
    for tensor in (t for head in heads for t in head.values()):
        assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    real["heads"] = sum(t.numel() for head in heads for t in head.values())
    assert counts == {**real, "total": sum(real.values())}


def test_the_record(save_run, build_model, tiny_shape, target_shape, metadata, tmp_path):
    said = {"revision": "v1", "license": "mit", "origin": "someone/tiny"}
    run = save_run(replace(metadata, **said))
    info = extract(run, tmp_path / "small")
    assert (tmp_path / "small" / "README.md").read_text(encoding="utf-8") == render_model_card(
        PruningRecord(**info)
    )
    assert_counts(tmp_path / "small", info["parameters"]["extracted"])
    source = sum(p.numel() for module in build_model(tiny_shape) for p in module.parameters())
    assert info["parameters"]["source"]["total"] == source
    expected = {
        "source": {"base_model": "someone/tiny", **said},
        "source_shape": asdict(tiny_shape),
        "shape": asdict(target_shape),
        "method": "l0",
        "seed": 5,
        "batches": {"prune": 12},
        "pooling": "cls",
        "max_seq_length": 78,
        "versions": metadata.versions,
        "tolerance": 1e-5,
        "checkpoint": str(run / "latest-rank0.pt"),
    }
    assert {key: info[key] for key in expected} == expected
    assert set(info) == {*expected, "kept", "constraint", "parameters", "largest_difference"}


def test_weights_and_the_line_about_an_extraction(run, build_model, tiny_shape, tmp_path, messages):
    with messages.at_level("INFO"):
        info = extract(run, tmp_path / "small")
    kept = info["kept"]
    before = build_model(tiny_shape, torch.float32)[0].state_dict()
    after = load_file(tmp_path / "small" / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(after[name], before[name][:, kept["hidden"]])
    name = "encoder.layer.{}.intermediate.dense.weight"
    rows = before[name.format(kept["layer"][1])][kept["intermediate"][1]]
    assert torch.equal(after[name.format(1)], rows[:, kept["hidden"]])
    counts = info["parameters"]
    share = 100 * counts["extracted"]["encoder"] / counts["source"]["encoder"]
    line = (
        f"2 layers, hidden 16, 2 heads, intermediate 32; {counts['extracted']['encoder']:,} "
        f"encoder parameters ({share:.1f}% of the source), {counts['extracted']['total']:,} in "
        "all in float32; dense vectors of 16, multi-vectors of 32; largest difference from the "
        f"masked model {info['largest_difference']:.1e}"
    )
    assert describe(PruningRecord(**info)) == line
    size = render_bytes(size_on_disk(str(tmp_path / "small")))
    assert f"wrote {tmp_path / 'small'} ({size}): {line}" in messages.text
    assert extract(run / "latest-rank0.pt", tmp_path / "second") == info


def test_a_budget_or_nothing_is_cut(metadata, save_run, tiny_shape, tmp_path):
    info = extract(save_run(replace(metadata, l0_module=None)), tmp_path / "same")
    assert info["shape"] == info["source_shape"] == asdict(tiny_shape)
    assert info["batches"] == {"train": 12}
    assert info["constraint"] == {}
    assert info["kept"]["head"] == [[0, 1, 2, 3]] * 4
    assert info["kept"]["hidden"] == list(range(32))
    budget = 0.43 * count_parameters(tiny_shape).encoder
    arguments = {**metadata.l0_module, "target": None, "target_parameters": budget}
    info = extract(save_run(replace(metadata, l0_module=arguments)), tmp_path / "small")
    assert info["parameters"]["extracted"]["encoder"] == pytest.approx(budget, rel=0.005)
    assert_counts(tmp_path / "small", info["parameters"]["extracted"])
    constraint = info["constraint"]["encoder"]
    assert constraint["target_sparsity"] == pytest.approx(0.57)
    assert constraint["realised_sparsity"] == pytest.approx(0.57, abs=0.0025)


def test_recovery_inherits_what_was_cut(run, metadata, save_run, target_shape, tmp_path):
    first = extract(run, tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    recovery = replace(
        metadata,
        base_model=str(tmp_path / "pruned"),
        shape=asdict(target_shape),
        hf_config=config,
        l0_module=None,
        source_pruning=first,
        seed=8,
        refit_texts=64,
    )
    info = extract(save_run(recovery), tmp_path / "recovered")
    assert (first.get("refit_texts"), info["refit_texts"]) == (None, 64)
    for key in ("source", "source_shape", "kept", "constraint", "shape"):
        assert info[key] == first[key]
    assert info["parameters"] == first["parameters"]
    assert info["batches"] == {"prune": 12, "recover": 12}
    assert info["seed"] == 8


def open_probability(log_alpha: float) -> float:
    return 1.0 / (1.0 + math.exp(-(log_alpha + SHIFT)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_constraint_report_is_its_formulas(tiny_shape, target_shape, metadata):
    module = L0Module(tiny_shape, **{**metadata.l0_module, "target": target_shape})
    generator = torch.Generator().manual_seed(2)
    for log_alpha in module.log_alpha.values():
        log_alpha.data = torch.randn(log_alpha.shape, generator=generator)
    gates = {axis: log_alpha.tolist() for axis, log_alpha in module.log_alpha.items()}
    found = compute_constraint_report(module, target_shape)
    report = {axis: row.as_dict() for axis, row in found.items()}
    p = {a: [open_probability(v) for v in gates[a]] for a in ("hidden", "layer")}
    for axis in ("head", "intermediate"):
        p[axis] = [[open_probability(v) for v in row] for row in gates[axis]]
        sparsity = [1.0 - mean(row) for row in p[axis]]
        assert report[axis]["expected_sparsity"] == pytest.approx(mean(sparsity), abs=1e-6)
        worst = max(abs(s - 0.5) for s in sparsity)
        assert report[axis]["largest_distance"] == pytest.approx(worst, abs=1e-6)
        assert worst > abs(mean(sparsity) - 0.5) + 1e-3
    for axis in ("hidden", "layer"):
        expected = 1.0 - mean(p[axis])
        assert report[axis]["expected_sparsity"] == pytest.approx(expected, abs=1e-6)
        assert report[axis]["largest_distance"] == pytest.approx(abs(0.5 - expected), abs=1e-6)
    h, count = sum(p["hidden"]), 0.0
    for layer, heads, units in zip(p["layer"], p["head"], p["intermediate"], strict=True):
        count += layer * (sum(heads) * (4 * 8 * h + 24) + sum(units) * (2 * h + 1) + 6 * h)
    full = 4 * (4 * (4 * 8 * 32 + 24) + 64 * 65 + 6 * 32)
    small = 2 * (2 * (4 * 8 * 16 + 24) + 32 * 33 + 6 * 16)
    row = report["encoder"]
    assert row["expected_sparsity"] == pytest.approx(1.0 - count / full, abs=1e-6)
    assert row["realised_sparsity"] == row["target_sparsity"] == pytest.approx(1.0 - small / full)
    assert set(report) == {*ALL, "encoder"}
    assert all(report[axis]["target_sparsity"] == 0.5 for axis in ALL)
    assert all(report[axis]["realised_sparsity"] == 0.5 for axis in ALL)


def unit_gates(shares: list[float]) -> dict[str, Tensor]:
    """Gates of units that are each open with their layer's probability, in an order of their own.

    The differences are too small to count.
    """
    base = torch.tensor([math.log(share / (1 - share)) - SHIFT for share in shares])
    return {"l0_module.log_alpha.intermediate": base[:, None] + 1e-5 * torch.randn(4, 64)}


def test_gates_far_from_the_target_are_spoken_of(gated, save_run, tmp_path, messages):
    """Every layer has a constraint of its own: 20 points too many may be 20 too few elsewhere."""

    def far(name: str, shares: list[float]) -> tuple[list[str], float]:
        messages.clear()
        info = extract(save_run(gated(("intermediate",)), unit_gates(shares)), tmp_path / name)
        said = [t for t in messages.messages if "the gates were far from what is cut" in t]
        return said, info["constraint"]["intermediate"]["largest_distance"]

    assert not far("met", [0.509] * 4)[0]
    (line, *_), _ = far("far", [0.525] * 4)
    assert (
        "the gates were far from what is cut, 'intermediate' by 2.5 points of sparsity (expected "
        "0.475 on average, cut 0.500)" in line
    )
    assert line.endswith(
        ": the run ended before the constraint was met. Train longer, or raise "
        "optimizer.lambda_2_lr."
    )
    assert messages.records[0].levelno == logging.WARNING
    lines, distance = far("on both sides", [0.3, 0.7, 0.3, 0.7])
    assert distance == pytest.approx(0.2, abs=1e-3)
    assert any("'intermediate'" in line for line in lines)


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with an extracted model in it."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "pruning.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"months of work")
    return folder


def shift_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["encoder.layer.1.output.dense.bias"][3] += 0.01
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shift_head(name: str, by: float = 0.01) -> Callable[[Path], None]:
    def shift(folder: Path) -> None:
        state = torch.load(folder / f"{name}.pt", weights_only=True)
        state["weight"][0, 3] += by
        torch.save(state, folder / f"{name}.pt")

    return shift


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def set_key(name: str, key: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, **{key: value})


def swap_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["Yes"] = vocabulary["Yes"], vocabulary["A"]
    path.write_text(json.dumps(content))


# All of these load without a word and compute something else.
SILENT = {
    "weight": (shift_weight, "last_hidden_state"),
    "colbert": (shift_head("colbert_linear"), "colbert_vecs"),
    "sparse": (shift_head("sparse_linear"), "token_weights"),
    "no colbert": (delete("colbert_linear.pt"), "colbert_vecs"),
    "no sparse": (delete("sparse_linear.pt"), "token_weights"),
    "heads": (set_key("config.json", "num_attention_heads", 4), "last_hidden_state"),
    "layers": (set_key("config.json", "num_hidden_layers", 1), "last_hidden_state"),
    "eps": (set_key("config.json", "layer_norm_eps", 0.1), "last_hidden_state"),
    "no modules": (delete("modules.json"), "sentence-transformers"),
    "no norm": (
        lambda folder: (folder / "modules.json").write_text(
            json.dumps(compute_modules(projected=False)[:2])
        ),
        "sentence-transformers",
    ),
    "pooling": (
        lambda folder: edit_json(
            folder / "1_Pooling" / "config.json",
            pooling_mode_cls_token=False,
            pooling_mode_mean_tokens=True,
        ),
        "dense_vecs",
    ),
    "length": (set_key("sentence_bert_config.json", "max_seq_length", 4), "sentence-transformers"),
    "tokens": (swap_tokens, "sentence-transformers"),
}


@pytest.fixture
def damage(monkeypatch) -> Callable[[Callable[[Path], None]], None]:
    """A function that has every written folder changed before it is validated."""
    write = extraction.write_model_folder

    def damage(change: Callable[[Path], None]) -> None:
        def write_and_change(folder: Path, *args: Any) -> None:
            write(folder, *args)
            change(folder)

        monkeypatch.setattr(extraction, "write_model_folder", write_and_change)

    return damage


@pytest.mark.parametrize("name", SILENT)
def test_a_folder_that_computes_something_else_is_not_delivered(name, run, damage, refuses):
    change, output = SILENT[name]
    damage(change)
    message = rf"the extracted model differs from .*{output} (\d|missing)"
    refuses(ValidationError, message, run)
    if name == "sparse":
        refuses(ValidationError, output, run, dtype=torch.float16)


def test_the_tolerance_is_1e_5_and_every_difference_is_named(run, tmp_path, damage):
    names = ("last_hidden_state", "dense_vecs", "token_weights", "colbert_vecs")
    message = (
        r"^the extracted model differs from the masked model by more than 1e-05: "
        + "".join(rf"{name} \d\.\d\de-0\d, " for name in names)
        + r"sentence-transformers \d\.\d\de-0\d "
        + r"\(of values above 1 relative to the largest\)\. To fix"
    )
    damage(shift_head("sparse_linear", by=5e-6))
    info = extract(run, tmp_path / "near")
    assert 4e-6 < info["largest_difference"] <= 1e-5
    damage(shift_head("sparse_linear", by=1e-5))
    with pytest.raises(ValidationError, match=r"more than 1e-05: token_weights 1\.\d+e-05"):
        extract(run, tmp_path / "far")
    damage(shift_weight)
    with pytest.raises(ValidationError, match=message):
        extract(run, tmp_path / "far")


@pytest.fixture
def magnifying_run(gated, save_run) -> Path:
    """A run of a model whose sharp attention magnifies what float32 rounds."""
    generator = torch.Generator().manual_seed(4)
    names = [f"{i}.attention.self.{part}.weight" for i in range(4) for part in ("query", "key")]
    sharp = {
        f"backbone.encoder.layer.{name}": 8.0 * torch.randn(32, 32, generator=generator)
        for name in names
    }
    return save_run(gated(("head", "hidden")), sharp)


def test_where_float32_cannot_tell_float64_does(magnifying_run, tmp_path, damage, refuses):
    info = extract(magnifying_run, tmp_path / "small")
    assert info["largest_difference"] > info["tolerance"] == 1e-5
    assert 0 < info["largest_difference_float64"] < 1e-9
    record = PruningRecord(**info)
    assert re.search(
        r"masked model \d\.\de-0\d in float32, \d\.\de-1\d in float64$", describe(record)
    )
    card = " ".join(render_model_card(record).split())
    assert re.search(r"largest difference \d\.\de-1\d, float64; in float32, whose", card)
    for name in ("weight", "colbert", "no sparse", "eps", "pooling", "tokens"):
        change, output = SILENT[name]
        damage(change)
        refuses(ValidationError, f"differs .*{output}", magnifying_run, tmp_path / "far")


def test_of_large_states_the_tolerance_is_relative(metadata, save_run, tmp_path, damage):
    """Nothing scales them and the sparse weights, and what float32 rounds grows with them."""

    def shift(by: float) -> Callable[[Path], None]:
        def shift_states(folder: Path) -> None:
            state = load_file(folder / "model.safetensors")
            last = max(int(name.split(".")[2]) for name in state if ".layer." in name)
            state[f"encoder.layer.{last}.output.LayerNorm.bias"][3] += by
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

        return shift_states

    last = extract(save_run(metadata), tmp_path / "kept")["kept"]["layer"][-1]
    large = {f"backbone.encoder.layer.{last}.output.LayerNorm.weight": torch.full((32,), 30.0)}
    run = save_run(metadata, large)
    damage(shift(by=1e-4))
    assert 1e-6 < extract(run, tmp_path / "near")["largest_difference"] <= 1e-5
    damage(shift(by=1e-2))
    with pytest.raises(ValidationError, match=r"more than 1e-05: last_hidden_state \d"):
        extract(run, tmp_path / "far")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_folder_that_does_not_load_is_not_delivered(name, run, damage, refuses):
    damage(delete(name))
    refuses((ValueError, OSError), None, run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_checkpoint_or_a_truncated_one_or_a_file_in_its_place(
    overwrite, run, tmp_path, refuses, request
):
    for name in ("nothing", "run/none.pt"):
        message = "no such run folder or checkpoint. To fix"
        refuses(FileNotFoundError, message, tmp_path / name, overwrite=overwrite)
    (tmp_path / "file").write_text("my file")
    message = r"is a file\. To fix, choose a folder that does not"
    refuses(FileExistsError, message, run, tmp_path / "file", overwrite=overwrite)
    if overwrite:
        request.getfixturevalue("old")
    path = run / "latest-rank0.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    message = r"latest-rank0\.pt: damaged, not complete.*To fix"
    refuses(ValueError, message, run, overwrite=overwrite)


def test_an_existing_folder_is_kept_and_one_of_something_else_never_replaced(run, old, refuses):
    message = r"small exists and is kept\. To fix, choose another folder, or pass --overwrite"
    refuses(FileExistsError, message, run, old)
    (old / "pruning.json").unlink()
    message = r"small holds no pruning\.json.* is kept .*To fix"
    refuses(FileExistsError, message, run, old, overwrite=True)


def test_wrong_shapes_counts_and_weights_are_not_delivered(
    gated, metadata, save_run, refuses, monkeypatch
):
    """Half the heads with the whole hidden size: no version of transformers loads it."""
    run = save_run(gated(("head",)))
    message = "transformers does not load the extracted model .*mismatch.*To fix"
    refuses(ValueError, message, run)
    for value in (math.nan, math.inf):
        weights = {"backbone.embeddings.LayerNorm.bias": torch.full((32,), value)}
        refuses(ValidationError, "last_hidden_state nan", save_run(metadata, weights))
    run = save_run(metadata)
    count = extraction.count_parameters
    monkeypatch.setattr(extraction, "count_parameters", lambda s: replace(count(s), embeddings=7))
    message = r"the cut model has .*, but its shape should have .*embeddings=7.*To fix"
    refuses(ValidationError, message, run)


def interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", [interrupt, shift_weight])
def test_a_failed_overwrite_keeps_the_old_folder(change, run, old, damage, refuses):
    damage(change)
    refuses((KeyboardInterrupt, ValidationError), None, run, old, overwrite=True)


def test_a_folder_is_replaced_and_made_with_its_parents(run, old, tmp_path):
    (old / "stale.txt").touch()
    extract(run, old, overwrite=True)
    assert not (old / "stale.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "small"}
    (tmp_path / "empty").mkdir()
    extract(run, tmp_path / "empty")
    extract(run, tmp_path / "a" / "b c" / "模型")
    assert (tmp_path / "a" / "b c" / "模型" / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "small", "empty", "a"}
