"""From the configuration to objects: what is refused, and what the objects then are."""

import io
import json
import logging
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import wandb
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU
from composer.utils import dist
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, XLMRobertaModel

from bge_pruning.algorithms.gradient_groups import GroupGradientClipping
from bge_pruning.algorithms.non_finite import NonFiniteGuard
from bge_pruning.algorithms.pruning_schedule import PruningSchedule
from bge_pruning.algorithms.source_weights import SourceWeights
from bge_pruning.algorithms.stop_on_signal import StopOnSignal
from bge_pruning.callbacks.progress_log import ProgressLog
from bge_pruning.callbacks.pruning_callback import GateMapCallback
from bge_pruning.config.command_checks import check_objective
from bge_pruning.config.load import Config, ConfigError, load_config
from bge_pruning.datasets.sts_dataloader import read_sts
from bge_pruning.model_io.checkpoint import RunMetadata
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.train import train
from bge_pruning.training import builders, data_builders
from bge_pruning.training import sources as source_builders
from bge_pruning.training.builders import (
    build_algorithms,
    build_base_model,
    build_callbacks,
    build_loggers,
    build_metadata,
    build_model,
    build_optimizer,
    build_scheduler,
    build_teacher,
    build_trainer,
    package_versions,
)
from bge_pruning.training.data_builders import (
    build_collections,
    build_evaluators,
    build_train_loader,
)
from bge_pruning.training.plan import build_plan
from bge_pruning.utils.run_log import FILE_ONLY

ROOT = Path(__file__).parents[2]
NO_TEACHER = ("loss.distillation_alignment=0", "loss.distillation_similarity=0")


@pytest.fixture
def configure(tiny_yaml) -> Callable[..., Config]:
    """A function that makes the tiny configuration with overrides."""
    return lambda *overrides: load_config([tiny_yaml], overrides)


@pytest.fixture
def base(configure) -> BaseModel:
    return build_base_model(configure())


@pytest.fixture
def copy_model(model_folder, tmp_path) -> Callable[..., Path]:
    """A function that copies the tiny model, with other values in ``config.json``."""

    def copy(name: str = "copy", **values: object) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / name)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return copy


def build_all(config: Config):
    """What training builds before the trainer, except for data."""
    base = build_base_model(config)
    metadata = build_metadata(config, build_plan(config), base)
    return metadata, build_model(config, base, metadata, build_teacher(config, base))


# Objective


def source(*kinds: str) -> str:
    sources = ", ".join(f"{{name: {k}, kind: {k}, path: nowhere}}" for k in kinds)
    return f"data.train=[{sources}]"


ZERO = "loss={sts_regression: 0, distillation_alignment: 0, distillation_similarity: 0}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=[]"], "data.train is empty. To fix, add configs/training/sts_only.yaml."),
        (
            [source("sts", "sts")],
            "two sources of data.train are called sts. To fix, rename one.",
        ),
        (
            [source("sts", "sts").replace("train", "eval")],
            "two sources of data.eval are called sts. To fix, rename one.",
        ),
        (
            [source("sts", "sentences").replace("}]", ", weight: 0.5}]")],
            "only sentences of data.train have a weight. To fix, give one to every source, or to "
            "none.",
        ),
        (
            ["data.adapt_weights_interval=2ba", "data.num_workers=1"],
            "data.adapt_weights_interval needs data.num_workers=0: workers load batches before",
        ),
        (
            ["data.adapt_weights_interval=2ba", "model.l0_module=null"],
            "data.adapt_weights_interval follows what pruning costs, and nothing is pruned",
        ),
        (
            ["loss.distillation_hidden=1"],
            "loss.distillation_hidden needs the teacher's hidden states, which are too many to "
            "cache. To fix, set teacher.cache=false.",
        ),
        (
            [source("sts", "beir"), ZERO.replace("sts_regression: 0", "sts_regression: 1")],
            "no loss applies to data source 'beir' of kind beir. To fix, set a weight under loss",
        ),
        (
            [source("sts").replace("}]", ", mined_negatives: 5}]")],
            "negatives of data source 'sts' need queries with passages, not kind sts. To fix",
        ),
        (
            [source("sts", "beir").replace("}]", ", mined_negatives: 5}]")],
            "data source 'beir' mines 5 negatives a query and uses none. To fix, set negatives",
        ),
        (
            [source("sts", "contrastive"), "loss.score_distillation=1"],
            "loss.score_distillation compares the passages of a row, and data source "
            "'contrastive' has 1 without negatives. To fix, set negatives above 0.",
        ),
        ([ZERO], "all weights under loss are 0. To fix, set e.g. loss.sts_regression=1."),
        (
            [source("sentences")],
            "loss.sts_regression needs data.train of kind sts. To fix, set it to 0 or add such "
            "data.",
        ),
    ],
)
def test_objectives_that_are_refused(overrides, message, configure):
    with pytest.raises(ConfigError) as error:
        check_objective(configure(*overrides))
    assert message in str(error.value)


def test_the_file_that_a_message_names_is_there():
    assert (ROOT / "configs/training/sts_only.yaml").is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        NO_TEACHER,
        [source("sentences", "mteb"), "loss.sts_regression=0"],
        [source("sts", "contrastive", "beir"), "loss.sts_regression=0"],
        ["device_train_microbatch_size=8"],
        ["device_train_microbatch_size=64"],
        ["device_train_microbatch_size=1", "loss.distillation_similarity=0"],
    ],
)
def test_objectives_that_are_accepted(overrides, configure):
    check_objective(configure(*overrides))


@pytest.mark.parametrize(
    ("overrides", "chunk", "micro"),
    [
        ([], None, 8),
        (["device_train_microbatch_size=3"], 3, 8),
        (["device_train_microbatch_size=3", "loss.distillation_similarity=0"], None, 3),
    ],
)
def test_a_batch_that_is_compared_is_cut_by_the_model(overrides, chunk, micro, configure):
    """The trainer's microbatches would make another loss of it."""
    config = configure(*overrides)
    assert build_all(config)[1].chunk_size == chunk
    assert builders._microbatch_size(config) == micro


# Metadata


def test_metadata_of_a_target_shape(configure, model_folder):
    config = configure("model.l0_module.init_mean=2.5", "model.l0_module.start_sparsity=0.1")
    metadata, model = build_all(config)
    assert metadata.base_model == str(model_folder)
    assert metadata.hf_config["num_hidden_layers"] == 4
    assert (metadata.pooling, metadata.max_seq_length, metadata.seed) == ("cls", 128, 3)
    assert metadata.source_pruning is None
    names = ("tokenizer.json", "tokenizer_config.json")
    assert metadata.tokenizer_files == {n: (model_folder / n).read_bytes() for n in names}
    l0 = metadata.l0_module
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    assert [metadata.shape[k] for k in sizes] == [32, 4, 4, 64]
    assert [l0["target"][k] for k in sizes] == [24, 3, 3, 48]
    assert (l0["axes"], l0["target_parameters"]) == (
        ["head", "hidden", "intermediate", "layer"],
        None,
    )
    assert (l0["start_sparsity"], l0["init_mean"], l0["init_std"], l0["seed"]) == (
        0.1,
        2.5,
        0.25,
        3,
    )
    assert model.l0_module.start_sparsity == 0.1
    assert float(model.l0_module.log_alpha["intermediate"].detach().mean()) == pytest.approx(
        2.5, abs=0.05
    )


def test_metadata_of_a_budget(configure):
    budget = ("model.l0_module.target_model=null", "model.l0_module.target_parameters=20000")
    metadata, _ = build_all(configure(*budget))
    assert metadata.l0_module["target"] is None
    assert metadata.l0_module["target_parameters"] == 20000


def test_metadata_of_a_run_without_gates(configure):
    metadata, model = build_all(configure("model.l0_module=null"))
    assert metadata.l0_module is None
    assert model.l0_module is None


def test_target_has_the_outer_parts_that_the_base_model_has(configure, copy_model):
    folder = copy_model()
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        (folder / name).unlink()
    metadata, model = build_all(configure(f"model.base_model={folder}"))
    for shape in (metadata.shape, metadata.l0_module["target"]):
        assert (shape["pooler"], shape["sparse_head"], shape["colbert_dim"]) == (True, False, 0)
    parts = model.l0_module.expected_parameters()
    assert parts.heads == 0


def test_outer_parts_of_the_plan_give_way_to_those_of_the_weights(configure, base):
    """A plan may be made from sizes alone, and then assumes what BGE-M3 has."""
    config = configure()
    plan = build_plan(config)
    bare = replace(plan.target, pooler=False, sparse_head=False, colbert_dim=0)
    target = build_metadata(config, replace(plan, target=bare), base).l0_module["target"]
    assert (target["pooler"], target["sparse_head"], target["colbert_dim"]) == (True, True, 32)
    assert target["num_hidden_layers"] == 3


def test_metadata_of_an_extracted_model(configure, base):
    pruning = {"source": {"base_model": "BAAI/bge-m3"}}
    config = configure()
    metadata = build_metadata(config, build_plan(config), replace(base, pruning=pruning))
    assert metadata.source_pruning == pruning


def test_metadata_says_whose_model_it_is(configure, base):
    config = configure()
    plan = build_plan(config)
    metadata = build_metadata(config, plan, base)
    assert (metadata.license, metadata.origin) == (None, None)
    metadata = build_metadata(config, plan, replace(base, license="mit", origin="BAAI/bge-m3"))
    assert (metadata.license, metadata.origin) == ("mit", "BAAI/bge-m3")


@pytest.mark.parametrize("at_target", [True, False])
def test_evaluation_is_of_the_target_or_of_the_gates_now(at_target, configure):
    value = str(at_target).lower()
    _, model = build_all(configure(f"model.l0_module.eval_target_model={value}"))
    ids = torch.tensor([[[0, 7, 9, 2]]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dense = model.eval()(batch)["dense_vecs"]
    # 24 of 32 dimensions are the target; nearly all are open at the start.
    assert int((dense != 0).sum()) == (24 if at_target else 32)


def test_metadata_survives_a_checkpoint(configure):
    metadata, _ = build_all(configure())
    assert RunMetadata.from_state_dict(metadata.state_dict()) == metadata


def test_versions(monkeypatch):
    versions = package_versions()
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"mosaicml", "transformers", "sentence-transformers", "tokenizers"} < versions.keys()
    monkeypatch.setattr(builders, "VERSIONED", ("no-such-package",))
    assert package_versions()["no-such-package"] == "not installed"


# Teacher


def test_no_teacher_without_distillation(configure, base):
    assert build_teacher(configure(*NO_TEACHER), base) is None


@pytest.mark.parametrize("part", NO_TEACHER)
def test_either_distillation_needs_a_teacher(part, configure, base):
    assert build_teacher(configure(part), base) is not None


def test_teacher_is_the_model_that_is_pruned(configure, base, model_folder):
    teacher = build_teacher(configure("model.revision=v2"), base)
    assert (teacher.name, teacher.revision) == (str(model_folder), "v2")


def test_teacher_that_is_named_has_its_own_revision(configure, base):
    teacher = build_teacher(configure("model.revision=v2", "teacher.base_model=a/b"), base)
    assert (teacher.name, teacher.revision) == ("a/b", None)


def test_teacher_of_an_extracted_model_is_the_one_that_was_cut(configure, base):
    cut = replace(base, pruning={"source": {"base_model": "BAAI/bge-m3"}})
    assert build_teacher(configure(), cut).name == "BAAI/bge-m3"
    assert build_teacher(configure("teacher.base_model=a/b"), cut).name == "a/b"


@pytest.fixture
def extracted(base, model_folder) -> BaseModel:
    """As far as the teacher's dimensions go, a model of three of 32 dimensions."""
    kept = {"source": {"base_model": str(model_folder)}, "kept": {"hidden": [1, 5, 7]}}
    return replace(base, shape=replace(base.shape, hidden_size=3), pruning=kept)


def build_student(config: Config, base: BaseModel):
    metadata = build_metadata(config, build_plan(config), base)
    return build_model(config, base, metadata, build_teacher(config, base))


def test_dimensions_of_an_extracted_student(configure, extracted, base):
    config = configure("model.l0_module=null")
    dimensions = build_student(config, extracted).teacher_dimensions
    assert dimensions.tolist() == [1, 5, 7]
    assert build_student(config, base).teacher_dimensions is None
    without = configure("model.l0_module=null", *NO_TEACHER)
    assert build_student(without, extracted).teacher_dimensions is None


@pytest.mark.parametrize(
    "pruning", [None, {"source": {"base_model": "?"}, "kept": {"hidden": [1]}}]
)
def test_teacher_of_another_size_is_refused(pruning, configure, extracted, model_folder):
    config = configure("model.l0_module=null", f"teacher.base_model={model_folder}")
    message = (
        r"teacher '.*tiny-xlmr' has 32 dimensions, .*tiny-xlmr 3, and no pruning.json says which "
        r"they are. To fix, distil from the model that it was cut from, or set "
        r"loss.distillation_alignment=0."
    )
    with pytest.raises(ConfigError, match=message):
        build_student(config, replace(extracted, pruning=pruning))


def test_similarities_can_be_distilled_from_a_teacher_of_another_size(
    configure, extracted, model_folder
):
    """The fix that the message above names: similarities need no common dimensions."""
    config = configure(
        "model.l0_module=null",
        f"teacher.base_model={model_folder}",
        "loss.distillation_alignment=0",
    )
    assert build_student(config, replace(extracted, pruning=None)).teacher_dimensions is None


def dense_vecs(
    folder: Path, ids: torch.Tensor, mask: torch.Tensor, pooling: str = "cls"
) -> torch.Tensor:
    model = XLMRobertaModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_teacher_pools_as_the_student_and_is_frozen(pooling, configure, model_folder):
    config = configure(f"model.pooling={pooling}", "model.dropout=0.5")
    teacher = build_teacher(config, build_base_model(config)).encoder()
    ids = torch.tensor([[0, 7, 9, 30, 2], [0, 8, 2, 1, 1]])
    vectors = teacher(ids, ids.ne(1).long())["dense_vecs"]
    expected = dense_vecs(model_folder, ids, ids.ne(1).long(), pooling)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    assert not vectors.requires_grad
    assert not any(p.requires_grad for p in teacher.backbone.parameters())


def test_training_is_in_the_dimensions_of_the_encoder(
    configure, projected_folder, base, caplog, monkeypatch
):
    """A projection neither of the trained model nor of its teacher plays a part."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)
    config = configure(f"model.base_model={projected_folder}", "teacher.cache=false")
    found = build_base_model(config)
    assert found.projection is None and found.shape == base.shape
    message = "tiny-projected: its projection to 40 dimensions is left out, training is in the 32 "
    assert message in caplog.text and "prune the model that it was cut from." in caplog.text
    build_base_model(configure(f"model.base_model={projected_folder}", "model.l0_module=null"))
    assert "Extract with --keep-dimension to get a new one." in caplog.text
    teacher = build_teacher(config, found)
    assert teacher.hidden_size() == 32
    ids = torch.tensor([[0, 5, 6, 2]])
    theirs = build_teacher(configure(), base).encoder()
    mask = torch.ones_like(ids)
    for name, vectors in teacher.encoder()(ids, mask).items():
        assert torch.equal(vectors, theirs(ids, mask)[name]), name


def test_a_run_that_starts_from_a_projected_model(train_tiny, projected_folder, tmp_path):
    """It trains, evaluates and is extracted as one without projection."""
    from bge_pruning.export.extract import extract
    from bge_pruning.model_io.pretrained import load_base_model

    run = train_tiny(tmp_path, f"model.base_model={projected_folder}")
    extract(run, tmp_path / "small")
    assert load_base_model(str(tmp_path / "small")).projection is None


def test_teacher_that_runs_in_every_step(configure, base, model_folder):
    config = configure("teacher.cache=false", "eval_batch_size=40", "model.l0_module=null")
    model = build_student(config, base)
    (batch,) = list(build_evaluators(config, base)[0].dataloader.dataloader)
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    outputs = torch.randn(40, 2, 32, generator=torch.Generator().manual_seed(0))
    cosines = (outputs.flatten(0, 1) * dense_vecs(model_folder, ids, mask)).sum(-1)
    loss = model.loss({"dense_vecs": outputs}, batch)["distillation_alignment"]
    assert float(loss) == pytest.approx(1.0 - float(cosines.mean()), abs=1e-5)
    # It is another copy, which is neither trained nor saved with the student.
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight.zero_()
    again = model.loss({"dense_vecs": outputs}, batch)["distillation_alignment"]
    assert torch.equal(again, loss)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "heads"}


def test_teacher_that_runs_in_every_step_leaves_no_file(configure, base, tmp_path):
    config = configure("teacher.cache=false")
    loader = build_train_loader(config, base, build_teacher(config, base)).dataloader
    names = {"input_ids", "attention_mask", "lengths", "scores", "source"}
    assert next(iter(loader)).keys() == names
    assert not list((tmp_path / "processed").glob("teacher-*"))


def test_teacher_is_not_loaded_for_vectors_that_are_kept(configure, base, monkeypatch):
    monkeypatch.setattr(builders.Teacher, "encoder", lambda _: pytest.fail("must not be loaded"))
    build_student(configure(), base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is neither a folder nor a hub name .*To fix, check the path"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "has neither .*To fix, choose a folder that",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:5000]
            ),
            "model.safetensors: damaged or not complete .*To fix, copy it again",
        ),
        (
            lambda f: (f / "config.json").unlink(),
            "config.json: no such file. To fix, choose a model",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON .*To fix"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            "model_type is 'bert', expected 'xlm-roberta'. To fix, choose an XLM-RoBERTa",
        ),
    ],
    ids=["no folder", "no weights", "cut weights", "no config", "cut config", "another kind"],
)
def test_teacher_that_cannot_be_read(damage, message, configure, base, copy_model, tmp_path):
    folder = copy_model()
    damage(folder)
    config = configure(f"teacher.base_model={folder}")
    with pytest.raises((ValueError, OSError), match=message):
        build_train_loader(config, base, build_teacher(config, base))
    assert list((tmp_path / "processed").glob("teacher-*")) == []


def test_teacher_of_another_vocabulary_is_refused(configure, base, copy_model):
    """The student's token ids would mean other words to it, and nothing would show it."""
    folder = copy_model()
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = [word for word in vocabulary if not word.startswith("<")]
    ids = [vocabulary[word] for word in words]
    vocabulary.update(zip(words, ids[::-1], strict=True))
    path.write_text(json.dumps(tokenizer))
    config = configure(f"teacher.base_model={folder}")
    message = r"different tokenizers: .* To fix, set teacher.base_model to a model with the tok"
    with pytest.raises(ConfigError, match=message):
        build_train_loader(config, base, build_teacher(config, base))


def test_teacher_with_other_multi_vectors_is_refused(configure, base):
    """As of a model whose head was made square: torch's word for it names neither model."""
    narrow = replace(base, shape=replace(base.shape, colbert_dim=16))
    config = configure("loss.distillation_colbert=1")
    message = r"has multi-vectors of 32 dimensions, .*tiny-xlmr of 16, so they cannot be compared\."
    with pytest.raises(ConfigError, match=message + r" To fix, set loss\.distillation_colbert=0"):
        build_train_loader(config, narrow, build_teacher(config, narrow))


# Training data


@pytest.fixture
def write_sts(tmp_path) -> Callable[..., str]:
    """A function that writes scored pairs and returns the override that trains on the files."""

    def write(*files: list[tuple[str, str, float]]) -> str:
        for index, rows in enumerate(files):
            path = tmp_path / f"{index}.tsv"
            path.write_text("".join(f"{a}\t{b}\t{s}\n" for a, b, s in rows))
        return f"data.train=[{{name: s, kind: sts, path: '{tmp_path}/?.tsv'}}]"

    return write


PAIRS = [
    [("the man plays", "a dog eats", 5.0), ("a cat", "the woman reads a red book", 0.0)],
    [("a horse rides fast", "a", 2.5), ("the man plays", "there", 1.0)],
]


def by_scores(batch: dict[str, torch.Tensor]) -> dict[float, list[list[int]]]:
    """Token ids of each pair, without padding, by score."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return {
        round(float(score), 4): [i[m].tolist() for i, m in zip(*pair, strict=True)]
        for score, *pair in zip(batch["scores"], ids, mask, strict=True)
    }


def test_pairs_of_all_files_with_scores_in_the_unit_interval(
    configure, base, write_sts, model_folder
):
    config = configure(write_sts(*PAIRS), *NO_TEACHER, "global_train_batch_size=4")
    (batch,) = list(build_train_loader(config, base, None).dataloader)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = {s / 5: tokenizer([a, b])["input_ids"] for a, b, s in PAIRS[0] + PAIRS[1]}
    assert by_scores(batch) == expected
    assert batch.keys() == {"input_ids", "attention_mask", "lengths", "scores", "source"}


@pytest.mark.parametrize(
    ("model_length", "base_length", "length"), [(5, 128, 5), (16, 4, 4), (16, 128, 8)]
)
def test_texts_are_cut_at_the_smaller_limit_and_it_is_said(
    model_length, base_length, length, configure, base, write_sts, monkeypatch
):
    messages = []
    log = source_builders.log
    monkeypatch.setattr(log, "info", lambda text, *a: messages.append(text % a))
    config = configure(
        write_sts(*PAIRS),
        *NO_TEACHER,
        "global_train_batch_size=4",
        f"model.max_length={model_length}",
    )
    short = replace(base, max_seq_length=base_length)
    (batch,) = list(build_train_loader(config, short, None).dataloader)
    assert batch["input_ids"].shape == (4, 2, length)
    # One of the 8 texts is there twice.
    cut = {5: "s: 2 of 7 texts cut at 5 tokens", 4: "s: 4 of 7 texts cut at 4 tokens"}
    assert messages == ([cut[length]] if length in cut else [])


def test_sentences_of_all_files_are_each_there_once(configure, base, tmp_path, model_folder):
    (tmp_path / "a.txt").write_text("a cat\nthe dog\n")
    (tmp_path / "b.txt").write_text("the dog\na horse rides\nthere\na cat\n")
    config = configure(
        f"data.train=[{{name: s, kind: sentences, path: '{tmp_path}/*.txt'}}]",
        "loss.sts_regression=0",
        "global_train_batch_size=4",
    )
    spec = build_train_loader(config, base, build_teacher(config, base))
    (batch,) = list(spec.dataloader)
    names = {"input_ids", "attention_mask", "lengths", "teacher_dense_vecs", "source"}
    assert batch.keys() == names
    ids, mask = batch["input_ids"].squeeze(1), batch["attention_mask"].squeeze(1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = {tokenizer.decode(row, skip_special_tokens=True) for row in ids}
    assert found == {"a cat", "the dog", "a horse rides", "there"}
    torch.testing.assert_close(
        batch["teacher_dense_vecs"].squeeze(1),
        dense_vecs(model_folder, ids, mask),
        atol=1e-5,
        rtol=0,
    )


def test_teacher_vectors_are_kept_for_the_next_run(configure, base, tmp_path, monkeypatch):
    config = configure()
    first = list(build_train_loader(config, base, build_teacher(config, base)).dataloader)
    kept = sorted((tmp_path / "processed").iterdir())
    assert [path.name.split("-")[0] for path in kept] == ["rows", "teacher"]
    teacher = build_teacher(config, base)
    monkeypatch.setattr(teacher, "encoder", lambda: pytest.fail("must not be loaded"))
    second = list(build_train_loader(config, base, teacher).dataloader)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["teacher_dense_vecs"], b["teacher_dense_vecs"])
    assert sorted((tmp_path / "processed").iterdir()) == kept


def vector_files(config: Config, base: BaseModel) -> set[str]:
    build_train_loader(config, base, build_teacher(config, base))
    return {path.name for path in Path(config.data.processed_folder).iterdir()}


def test_a_copy_of_the_teacher_has_the_same_vectors(configure, base, copy_model):
    config = configure(f"teacher.base_model={copy_model()}")
    assert vector_files(configure(), base) == vector_files(config, base)


def test_other_weights_have_other_vectors(configure, base, copy_model):
    folder = copy_model()
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.3.output.dense.bias"][0] += 0.5
    save_file(weights, folder / "model.safetensors")
    before = vector_files(configure(), base)
    assert before < vector_files(configure(f"teacher.base_model={folder}"), base)


def test_another_pooling_has_other_vectors(configure):
    before = vector_files(configure(), build_base_model(configure()))
    mean = configure("model.pooling=mean")
    assert before < vector_files(mean, build_base_model(mean))


def test_another_size_of_heads_has_other_vectors(configure, base, copy_model):
    """Wrong numbers of heads load the same weights, and are corrected in ``config.json`` alone."""
    folder = copy_model(num_attention_heads=2)
    before = vector_files(configure(), base)
    assert before < vector_files(configure(f"teacher.base_model={folder}"), base)


def test_the_first_process_makes_the_vectors(configure, base, monkeypatch):
    """Who waits for whom inside: test_rank_watch.py."""
    events = []

    @contextmanager
    def rank_zero_first():
        events.append("enter")
        yield
        events.append("leave")

    monkeypatch.setattr(data_builders, "rank_zero_first", rank_zero_first)
    monkeypatch.setattr(
        data_builders,
        "cached_teacher_outputs",
        lambda *_: events.append("work") or {"dense_vecs": np.zeros((80, 2))},
    )
    config = configure()
    build_train_loader(config, base, build_teacher(config, base))
    assert events == ["enter", "work", "leave"]


def test_processes_share_a_batch(configure, base, monkeypatch):
    config = configure(*NO_TEACHER)
    whole = list(build_train_loader(config, base, None).dataloader)
    shares = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        shares.append(list(build_train_loader(config, base, None).dataloader))
    assert len(whole) == 5
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part["scores"]) for part in parts] == [4, 4]
        assert {**by_scores(parts[0]), **by_scores(parts[1])} == by_scores(batch)


def test_the_order_of_batches_follows_from_the_seed(configure, base):
    def order(seed: int) -> list[list[float]]:
        config = configure(f"seed={seed}", *NO_TEACHER)
        return [b["scores"].tolist() for b in build_train_loader(config, base, None).dataloader]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(("size", "sizes"), [(3, [3, 3, 2]), (4, [4, 4]), (8, [8]), (9, [8])])
def test_a_batch_splits_into_parts_in_order(size, sizes, configure, base):
    spec = build_train_loader(configure(*NO_TEACHER), base, None)
    batch = next(iter(spec.dataloader))
    parts = spec.split_batch(batch, size)
    assert [len(part["input_ids"]) for part in parts] == sizes
    for key, whole in batch.items():
        values = [part[key] for part in parts]
        if key == "source":
            assert set(values) == {whole}
        elif key == "lengths":
            joined = [row for value in values for row in value]
            assert joined == whole == batch["attention_mask"].sum(-1).tolist()
        else:
            assert torch.equal(torch.cat(values), whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["global_train_batch_size=41"], "global_train_batch_size 41 is larger than the training"),
        ([source("sts")], "nowhere: no such file. To fix, check the path"),
        (
            ["data.train=[{name: a, kind: sts, path: no.csv}]"],
            "no.csv: no such file. To fix, check",
        ),
    ],
)
def test_training_data_that_is_refused(overrides, message, configure, base):
    with pytest.raises((ValueError, OSError), match=message):
        build_train_loader(configure(*overrides, *NO_TEACHER), base, None)


def test_a_text_that_is_no_unicode_names_its_line(configure, base, tmp_path):
    """JSON can spell half of a surrogate pair, as crawled texts that were cut have it."""
    path = tmp_path / "a.jsonl"
    row = '{"sentence1": "a cat", "sentence2": "b", "score": 1}\n'
    path.write_text(row + row.replace("b", r"\ud83d"))
    config = configure(f"data.train=[{{name: a, kind: sts, path: {path}}}]", *NO_TEACHER)
    with pytest.raises(ValueError, match=r"a.jsonl:2: sentence2 .*To fix"):
        build_train_loader(config, base, None)


# Evaluation data


def test_evaluators_hold_every_pair_once_and_similar_lengths_together(configure, base, sts_csv):
    sources = ", ".join(f"{{name: {n}, kind: sts, path: {sts_csv}}}" for n in ("dev", "test"))
    evaluators = build_evaluators(configure(f"data.eval=[{sources}]", "eval_batch_size=12"), base)
    assert [e.label for e in evaluators] == ["dev", "test"]
    assert [e.metric_names for e in evaluators] == [["cosine_spearman"]] * 2
    batches = list(evaluators[1].dataloader.dataloader)
    assert [len(batch["scores"]) for batch in batches] == [12, 12, 12, 4]
    widths = [batch["input_ids"].shape[2] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    pairs = read_sts(sts_csv)
    tokenizer = AutoTokenizer.from_pretrained(base.name)
    texts = zip(pairs.sentences1, pairs.sentences2, strict=True)
    expected = {
        round(score / 5, 4): tokenizer(list(pair), truncation=True, max_length=16)["input_ids"]
        for pair, score in zip(texts, pairs.scores, strict=True)
    }
    found = {}
    for batch in batches:
        found |= by_scores(batch)
    assert found == expected


EVALUATED = "dev/cosine_spearman, x/ndcg_at_10, x/mrr_at_10, x/recall_at_100, x/map_at_100"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [source("sentences").replace("train", "eval")],
            "data.eval 'sentences' is of kind sentences; sts, beir, mteb can be evaluated. To fix",
        ),
        (
            [source("contrastive").replace("train", "eval")],
            "data.eval 'contrastive' is of kind contrastive; sts, beir, mteb can be evaluated.",
        ),
        (["evaluation.modes=[]"], "evaluation.modes is empty. To fix, write e.g. [dense]."),
        (
            ["evaluation.modes=[dense, late]"],
            "evaluation.modes[1] 'late' is not one of ('dense', 'sparse', 'colbert', "
            "'dense+sparse', 'all'). To fix, choose one.",
        ),
        (
            ["evaluation.keep_best=eval/dev/cosine_spearman"],
            "evaluation.keep_best 'eval/dev/cosine_spearman' is not evaluated. To fix, choose one "
            "of dev/cosine_spearman.",
        ),
        (
            [
                "data.eval=[{name: dev, kind: sts, path: a}, {name: x, kind: beir, path: b}]",
                "evaluation.keep_best=x/ndcg_at_5",
            ],
            f"evaluation.keep_best 'x/ndcg_at_5' is not evaluated. To fix, choose one of "
            f"{EVALUATED}.",
        ),
        (
            [
                "data.eval=[{name: x, kind: mteb, path: b}]",
                "evaluation.modes=[sparse]",
                "evaluation.keep_best=x/ndcg_at_10",
            ],
            "To fix, choose one of x/sparse_ndcg_at_10, x/sparse_mrr_at_10",
        ),
        (
            ["data.eval=[]", "evaluation.keep_best=dev/cosine_spearman"],
            "is not evaluated. To fix, choose one of the scores of data.eval, which is empty.",
        ),
        (
            ["evaluation.keep_best=dev/cosine_spearman", "model.l0_module.eval_target_model=false"],
            "evaluation.keep_best would keep the model before anything is pruned: with "
            "model.l0_module.eval_target_model=false it is evaluated as large as it still is. To "
            "fix, set eval_target_model=true, or keep_best=null.",
        ),
    ],
)
def test_evaluations_that_are_refused(overrides, message, configure):
    with pytest.raises(ConfigError) as error:
        check_objective(configure(*overrides))
    assert message in str(error.value)


def test_a_best_checkpoint_of_every_kind_is_accepted(configure):
    data = "data.eval=[{name: x, kind: beir, path: a}, {name: y, kind: sts, path: a}]"
    modes = "evaluation.modes=[dense, dense+sparse]"
    for key in ("y/cosine_spearman", "x/recall_at_100", "x/dense+sparse_map_at_100"):
        check_objective(configure(data, modes, f"evaluation.keep_best={key}"))
    check_objective(configure("model.l0_module=null", "evaluation.keep_best=dev/cosine_spearman"))


def test_evaluators_are_asked_at_the_interval_and_at_the_last_batch(configure, base):
    (evaluator,) = build_evaluators(configure("eval_interval=2ba"), base)
    state = State(base.backbone, 0, "run", DeviceCPU(), max_duration="5ba")
    asked = []
    for batch in range(1, 6):
        state.timestamp = Timestamp(batch=batch)
        for event in (Event.BATCH_END, Event.EPOCH_END, Event.FIT_END):
            if evaluator.eval_interval(state, event):
                asked.append((batch, event))
    assert asked == [(2, Event.BATCH_END), (4, Event.BATCH_END), (5, Event.BATCH_END)]


def test_collections_are_read_with_their_split(configure, base, collection, tmp_path):
    other = shutil.copytree(collection, tmp_path / "other")
    (other / "qrels" / "test.tsv").rename(other / "qrels" / "held-out.tsv")
    config = configure(
        f"data.eval=[{{name: a, kind: beir, path: {collection}, split: test}},"
        f" {{name: b, kind: beir, path: {other}, split: held-out}}]",
        "evaluation.modes=[all, dense]",
    )
    check_objective(config)
    found = build_collections(config, base)
    assert {name: task.split for name, task in found.items()} == {"a": "test", "b": "held-out"}
    assert build_evaluators(config, base) == []


def test_a_collection_that_is_wrong_stops_before_training(configure, collection, tmp_path):
    data = f"data.eval=[{{name: a, kind: beir, path: {collection}, split: dev}}]"
    with pytest.raises(FileNotFoundError, match=r"qrels/dev\.tsv: no such file\. To fix, check"):
        train(configure(data))
    assert not (tmp_path / "runs").exists()


def test_texts_of_a_collection_need_room(configure, base, collection):
    data = f"data.eval=[{{name: a, kind: beir, path: {collection}, split: test}}]"
    message = (
        r"max_length 2 leaves no room for text beside 2 special tokens\. To fix, set max_length"
    )
    with pytest.raises(ValueError, match=message):
        build_collections(configure(data, "evaluation.max_length=2"), base)


def test_a_task_of_mteb_by_name(configure, base, monkeypatch):
    asked = []
    monkeypatch.setattr(data_builders, "mteb_task", lambda *a: asked.append(a) or "task")
    config = configure(
        "data.eval=[{name: a, kind: mteb, path: SciFact, split: test},"
        " {name: b, kind: mteb, path: MIRACLRetrieval, split: dev, subset: sw}]"
    )
    assert build_collections(config, base) == {"a": "task", "b": "task"}
    assert asked == [("SciFact", "test", None), ("MIRACLRetrieval", "dev", "sw")]


def test_a_task_of_mteb_without_a_network(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = r"^mteb task 'SciFact': cannot load split 'test' .*To fix, run once where the hub can"
    with pytest.raises(FileNotFoundError, match=message):
        train(configure("data.eval=[{name: a, kind: mteb, path: SciFact, split: test}]"))
    assert not (tmp_path / "runs").exists()


def test_a_mode_without_its_head_is_refused(configure, copy_model, collection):
    folder = copy_model()
    (folder / "colbert_linear.pt").unlink()
    config = configure(
        f"model.base_model={folder}",
        f"data.eval=[{{name: a, kind: beir, path: {collection}, split: test}}]",
        "evaluation.modes=[dense, all]",
    )
    message = (
        f"evaluation.modes: mode all needs colbert vectors, and {folder} has no head for them. To "
        f"fix, choose among dense, sparse, dense+sparse, or use a model with that head."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_collections(config, build_base_model(config))


def test_no_evaluation_data(configure, base):
    assert build_evaluators(configure("data.eval=[]"), base) == []
    assert build_collections(configure("data.eval=[]"), base) == {}


# Optimisation; the groups of a run with gates are tested in test_train.py


def test_a_run_without_gates_has_weights_only(configure):
    config = configure(
        "model.l0_module=null",
        "optimizer={weight_decay: 0.25, betas: [0.5, 0.75], eps: 1.0e-3, lr: 0.125}",
    )
    _, model = build_all(config)
    optimizer = build_optimizer(config, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay, rest = optimizer.param_groups
    assert (decay["name"], rest["name"]) == ("weights/decay", "weights/no_decay")
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    for group in (decay, rest):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.75), 1e-3, 0.125)
        assert not group["maximize"]
    # Six matrices a layer; the pooler's is one more where it is trained.
    matrices = {n for n, p in model.backbone.named_parameters() if p.ndim == 2 and p.requires_grad}
    embeddings = {n for n in matrices if n.startswith("embeddings.")}
    assert len(embeddings) == 3
    names = {p: n for n, p in model.backbone.named_parameters()}
    assert {names[p] for p in decay["params"]} == matrices - embeddings
    assert len(matrices - embeddings) in (24, 25)


def test_frozen_weights_are_not_optimised(configure):
    config = configure("model.l0_module=null")
    _, model = build_all(config)
    model.backbone.embeddings.requires_grad_(False)
    model.backbone.encoder.layer[0].requires_grad_(False)
    optimized = {p for g in build_optimizer(config, model).param_groups for p in g["params"]}
    assert optimized == {p for p in model.parameters() if p.requires_grad}
    assert model.backbone.embeddings.word_embeddings.weight not in optimized


def factor(name: str, step: int, alpha_f: float, warmup: int = 4, last: int = 20) -> float:
    """Learning-rate factor by the textbook."""
    if step < warmup:
        return step / warmup
    share = (step - warmup) / (last - warmup)
    shape = {
        "linear": 1 - share,
        "cosine": (1 + math.cos(math.pi * share)) / 2,
        "constant": 1.0,
    }[name]
    return shape if name == "constant" else alpha_f + (1 - alpha_f) * shape


@pytest.mark.parametrize("warmup", ["4ba", "0.2dur"])
@pytest.mark.parametrize("alpha_f", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rate_schedules(name, alpha_f, warmup, configure):
    config = configure(
        f"scheduler.name={name}",
        f"scheduler.alpha_f={alpha_f}",
        f"scheduler.t_warmup={warmup}",
    )
    schedule = build_scheduler(config)
    state = State(torch.nn.Linear(1, 1), 0, "run", DeviceCPU(), max_duration="20ba")
    for step in range(21):
        state.timestamp = Timestamp(batch=step)
        assert schedule(state, 1.0) == pytest.approx(factor(name, step, alpha_f), abs=1e-9)


def test_algorithms(configure):
    config = configure("optimizer.max_grad_norm=0.5")
    _, model = build_all(config)
    base = build_base_model(config)
    loader = build_train_loader(config, base, build_teacher(config, base))
    stop = StopOnSignal()
    schedule, clipping, guard, last = build_algorithms(config, model, loader, stop)
    assert last is stop and clipping.guard is guard
    assert isinstance(schedule, PruningSchedule) and schedule.l0_module is model.l0_module
    assert schedule.warmup.to_timestring() == "0.5dur"
    assert isinstance(clipping, GroupGradientClipping) and clipping.max_norm == 0.5
    assert isinstance(guard, NonFiniteGuard) and not guard.skip
    none = ("optimizer.max_grad_norm=0", "model.l0_module=null", "optimizer.non_finite=skip")
    bare = configure(*none)
    guard, _ = build_algorithms(bare, build_all(bare)[1], loader, stop)
    assert isinstance(guard, NonFiniteGuard) and guard.skip
    adaptive = configure("data.adapt_weights_interval=2ba", "data.adapt_batches=3")
    weights = build_algorithms(adaptive, model, loader, stop)[0]
    assert isinstance(weights, SourceWeights)
    assert weights.dataset is loader.dataloader.dataset
    ((*probes,),) = weights.probes
    first = loader.dataloader.batch_sampler.rows_of(0, 0)[:3]
    expected = [[loader.dataloader.dataset[0, i]["score"] for i in rows] for rows in first]
    assert [batch["scores"].tolist() for batch in probes] == expected


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_what_the_trainer_is_told(terminal, wanted, configure, monkeypatch, tmp_path):
    config = configure(
        f"progress_bar={str(wanted).lower()}",
        "save_interval=5ba",
        "max_duration=7ba",
        "checkpoints_to_keep=6",
        "autoresume=true",
        "device_train_microbatch_size=8",
        "seed=9",
    )
    _, model = build_all(config)
    monkeypatch.setattr(builders, "Trainer", dict)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    stop = StopOnSignal()
    told = build_trainer(config, model, "data", ["evaluators"], ["callbacks"], stop)
    expected = {
        "model": model,
        "train_dataloader": "data",
        "eval_dataloader": ["evaluators"],
        "callbacks": ["callbacks"],
        "max_duration": "7ba",
        "save_num_checkpoints_to_keep": 6,
        "save_folder": str(tmp_path / "runs" / "tiny"),
        "run_name": "tiny",
        "autoresume": True,
        "device_train_microbatch_size": 8,
        "seed": 9,
        "precision": "fp32",
        "device": "cpu",
        "progress_bar": terminal and wanted,
    }
    assert {key: told[key] for key in expected} == expected
    assert told["algorithms"][-1] is stop
    progress = told["loggers"][-1]
    assert isinstance(progress, ProgressLog)
    assert progress.extra == {FILE_ONLY: terminal and wanted}
    assert progress.final_targets == model.l0_module.final_targets()


# Loggers


def read_metrics(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["batch"]: row["metrics"][key] for row in rows if key in row["metrics"]}


def test_a_metrics_file_is_always_there(configure, tmp_path):
    (logger,) = build_loggers(configure())
    assert logger.path == tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert not (tmp_path / "logs").exists()


def test_tensorboard_has_every_metric(tmp_path, train_tiny):
    run = train_tiny(tmp_path, "max_duration=3ba", "loggers.tensorboard=true")
    folder = tmp_path / "logs" / "tiny" / "tiny"
    events = EventAccumulator(str(folder)).Reload()
    for key in ("loss/train/total", "pruning/lambda_1/hidden", "metrics/dev/cosine_spearman"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == pytest.approx(read_metrics(run, key), rel=1e-6)


class Stream(io.StringIO):
    """A stream whose methods can be replaced, as those of the real one."""


def test_log_file_has_metrics(tmp_path, train_tiny, monkeypatch):
    for name in ("stdout", "stderr"):  # the logger replaces their methods for good
        monkeypatch.setattr(sys, name, Stream())
    run = train_tiny(tmp_path, "max_duration=2ba", "loggers.file=true")
    text = (tmp_path / "logs" / "tiny" / "prune-rank0.txt").read_text()
    losses = read_metrics(run, "loss/train/total")
    assert len(losses) == 2
    for batch, value in losses.items():
        assert f"[metric][batch={batch}]: loss/train/total: {value:.4f} " in text


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """A machine that W&B does not know; its folders are this test's."""
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.finish()


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("wandb_keys", ["null", "{}"])
def test_gates_are_drawn_while_training_only_where_wandb_shows_them(wandb_keys, gates, configure):
    config = configure(f"loggers.wandb={wandb_keys}")
    module = SimpleNamespace(expected_sparsity=lambda: {"hidden": torch.zeros(1)})
    model = SimpleNamespace(l0_module=module if gates else None, special_ids=())
    drawn = [type(c) for c in build_callbacks(config, model, None, None, {})].count(GateMapCallback)
    assert drawn == (gates and wandb_keys == "{}")


@pytest.mark.usefixtures("no_account")
def test_wandb_works_offline_and_without_an_account(tmp_path, train_tiny):
    run = train_tiny(tmp_path, "max_duration=3ba", "loggers.wandb={}", report=True)
    wandb.finish()
    (folder,) = (tmp_path / "logs" / "tiny" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    words = [b"bge_pruning", b"tiny", b"loss/train/total", b"pruning/lambda_1/hidden"]
    words += [b"report/page", b"report/gates"]
    for _ in range(200):  # W&B's own process writes the record, and may be behind
        if all(word in record.read_bytes() for word in words):
            break
        time.sleep(0.1)
    assert [word for word in words if word not in record.read_bytes()] == []
    assert len(read_metrics(run, "loss/train/total")) == 3


@pytest.mark.parametrize("rows", [None, 3, 8])
def test_the_widest_batch_is_that_of_all_batches(rows, configure, base):
    loader = build_train_loader(configure(*NO_TEACHER), base, None).dataloader
    sums = []
    for batch in loader:
        size = rows or len(batch["lengths"])
        parts = [batch["lengths"][i : i + size] for i in range(0, len(batch["lengths"]), size)]
        sums += [sum(map(sum, part)) for part in parts]
    assert loader.batch_sampler.widest_batch(rows) == max(sums)
