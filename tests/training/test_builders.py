"""From the configuration to models, teachers, algorithms and the trainer."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Precision
from composer.loggers import ProgressBarLogger

from bge_pruning.algorithms.gradient_groups import GroupGradientClipping
from bge_pruning.algorithms.non_finite import NonFiniteGuard
from bge_pruning.algorithms.pruning_schedule import PruningSchedule
from bge_pruning.algorithms.row_updates import RowGradients
from bge_pruning.algorithms.source_weights import SourceWeights
from bge_pruning.algorithms.stop_on_signal import StopOnSignal
from bge_pruning.callbacks.progress_log import ProgressLog
from bge_pruning.config.load import ConfigError
from bge_pruning.export.extract import extract
from bge_pruning.model_io.checkpoint import RunMetadata
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.training import builders
from bge_pruning.training.builders import build_base_model, build_metadata, build_teacher
from bge_pruning.training.data_builders import build_evaluators, build_train_loader
from bge_pruning.training.plan import build_plan
from bge_pruning.utils.records import PruningRecord
from bge_pruning.utils.run_log import FILE_ONLY

NO_TEACHER = ("loss.distillation_alignment=0", "loss.distillation_similarity=0")


@pytest.fixture
def record(make_pruning) -> Callable[..., PruningRecord]:
    """A function that makes the record of a model that was cut from another one."""

    def make(source: str, **kept: list[int]) -> PruningRecord:
        content = make_pruning()
        return PruningRecord(**content | {"source": {"base_model": source}, "kept": kept})

    return make


@pytest.mark.parametrize(
    ("overrides", "chunk", "micro"),
    [
        ([], None, 8),
        (["device_train_microbatch_size=3"], 3, 8),
        (["device_train_microbatch_size=3", "loss.distillation_similarity=0"], None, 3),
    ],
)
def test_a_batch_that_is_compared_is_cut_by_the_model(
    overrides, chunk, micro, configure, build_all
):
    config = configure(*overrides)
    assert build_all(config)[1].chunk_size == chunk
    assert builders._microbatch_size(config) == micro


def test_metadata_of_a_target_shape(configure, model_folder, build_all):
    config = configure("model.l0_module.init_mean=2.5", "model.l0_module.start_sparsity=0.1")
    metadata, model = build_all(config)
    assert metadata.base_model == str(model_folder)
    assert metadata.hf_config["num_hidden_layers"] == 4
    assert (metadata.pooling, metadata.max_seq_length, metadata.seed) == ("cls", 128, 3)
    assert metadata.source_pruning is metadata.license is metadata.origin is None
    names = ("tokenizer.json", "tokenizer_config.json")
    assert metadata.tokenizer_files == {n: (model_folder / n).read_bytes() for n in names}
    versions = metadata.versions
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"mosaicml", "transformers", "sentence-transformers", "tokenizers"} < versions.keys()
    assert builders.package_versions(["no-such-package"])["no-such-package"] == "not installed"
    l0 = metadata.l0_module
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    assert [metadata.shape[k] for k in sizes] == [32, 4, 4, 64]
    assert [l0["target"][k] for k in sizes] == [24, 3, 3, 48]
    assert l0["axes"] == ["head", "hidden", "intermediate", "layer"]
    names = ("target_parameters", "start_sparsity", "init_mean", "init_std", "seed")
    assert [l0[name] for name in names] == [None, 0.1, 2.5, 0.25, 3]
    assert model.l0_module.start_sparsity == 0.1
    mean = float(model.l0_module.log_alpha["intermediate"].detach().mean())
    assert mean == pytest.approx(2.5, abs=0.05)
    assert RunMetadata.from_state_dict(metadata.state_dict()) == metadata


def test_metadata_of_other_runs(configure, build_all, base, record, monkeypatch):
    """Of a budget, without gates, and of a model that was cut before."""
    # The teacher is not loaded for vectors that are kept.
    monkeypatch.setattr(builders.Teacher, "encoder", lambda _: pytest.fail("must not be loaded"))
    budget = ("model.l0_module.target_model=null", "model.l0_module.target_parameters=20000")
    metadata, _ = build_all(configure(*budget))
    assert metadata.l0_module["target"] is None
    assert metadata.l0_module["target_parameters"] == 20000
    metadata, model = build_all(configure("model.l0_module=null"))
    assert metadata.l0_module is model.l0_module is None
    config, pruning = configure(), record("BAAI/bge-m3")
    cut = replace(base, pruning=pruning, license="mit", origin="BAAI/bge-m3")
    metadata = build_metadata(config, build_plan(config), cut)
    assert metadata.source_pruning == pruning.as_dict()
    assert (metadata.license, metadata.origin) == ("mit", "BAAI/bge-m3")


def test_target_has_the_outer_parts_that_the_base_model_has(configure, copy_model, build_all, base):
    config = configure()
    plan = build_plan(config)  # made from sizes alone, it assumes what BGE-M3 has
    bare = replace(plan.target, pooler=False, sparse_head=False, colbert_dim=0)
    target = build_metadata(config, replace(plan, target=bare), base).l0_module["target"]
    assert (target["pooler"], target["sparse_head"], target["colbert_dim"]) == (True, True, 32)
    assert target["num_hidden_layers"] == 3
    folder = copy_model()
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        (folder / name).unlink()
    metadata, model = build_all(configure(f"model.base_model={folder}"))
    for shape in (metadata.shape, metadata.l0_module["target"]):
        assert (shape["pooler"], shape["sparse_head"], shape["colbert_dim"]) == (True, False, 0)
    assert model.l0_module.expected_parameters().heads == 0


@pytest.mark.parametrize("at_target", [True, False])
def test_evaluation_is_of_the_target_or_of_the_gates_now(at_target, configure, build_all):
    value = str(at_target).lower()
    _, model = build_all(configure(f"model.l0_module.eval_target_model={value}"))
    ids = torch.tensor([[[0, 7, 9, 2]]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dense = model.eval()(batch)["dense_vecs"]
    # 24 of 32 dimensions are the target; nearly all are open at the start.
    assert int((dense != 0).sum()) == (24 if at_target else 32)


def test_who_is_the_teacher(configure, base, model_folder, record):
    assert build_teacher(configure(*NO_TEACHER), base) is None
    assert all(build_teacher(configure(part), base) is not None for part in NO_TEACHER)
    teacher = build_teacher(configure("model.revision=v2"), base)
    assert (teacher.name, teacher.revision) == (str(model_folder), "v2")
    teacher = build_teacher(configure("model.revision=v2", "teacher.base_model=a/b"), base)
    assert (teacher.name, teacher.revision) == ("a/b", None)
    cut = replace(base, pruning=record("BAAI/bge-m3"))
    assert build_teacher(configure(), cut).name == "BAAI/bge-m3"
    assert build_teacher(configure("teacher.base_model=a/b"), cut).name == "a/b"


@pytest.fixture
def extracted(base, model_folder, record) -> BaseModel:
    """A model of three of 32 dimensions."""
    pruning = record(str(model_folder), hidden=[1, 5, 7])
    return replace(base, shape=replace(base.shape, hidden_size=3), pruning=pruning)


def test_dimensions_of_an_extracted_student(configure, extracted, base, build_all):
    config = configure("model.l0_module=null")
    dimensions = build_all(config, extracted)[1].teacher_dimensions
    assert dimensions.tolist() == [1, 5, 7]
    assert build_all(config, base)[1].teacher_dimensions is None
    without = configure("model.l0_module=null", *NO_TEACHER)
    assert build_all(without, extracted)[1].teacher_dimensions is None


@pytest.mark.parametrize("kept", [None, [1]])
def test_teacher_of_another_size_is_refused(
    kept, configure, extracted, model_folder, build_all, record
):
    pruning = record("?", hidden=kept) if kept else None
    config = configure("model.l0_module=null", f"teacher.base_model={model_folder}")
    message = (
        r"teacher '.*tiny-xlmr' has 32 dimensions, .*tiny-xlmr 3, and no pruning.json says which "
        r"they are. To fix, distil from the model that it was cut from, or set "
        r"loss.distillation_alignment=0."
    )
    other = replace(extracted, pruning=pruning)
    with pytest.raises(ConfigError, match=message):
        build_all(config, other)
    config.loss.distillation_alignment = 0.0  # similarities need no common dimensions
    assert build_all(config, other)[1].teacher_dimensions is None


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_teacher_pools_as_the_student_and_is_frozen(pooling, configure, model_folder, dense_vecs):
    config = configure(f"model.pooling={pooling}", "model.dropout=0.5")
    teacher = build_teacher(config, build_base_model(config)).encoder()
    ids = torch.tensor([[0, 7, 9, 30, 2], [0, 8, 2, 1, 1]])
    vectors = teacher(ids, ids.ne(1).long())["dense_vecs"]
    expected = dense_vecs(ids, ids.ne(1).long(), pooling)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    assert not vectors.requires_grad
    assert not any(p.requires_grad for p in teacher.backbone.parameters())


def test_training_is_in_the_dimensions_of_the_encoder(
    configure, projected_folder, base, caplog, monkeypatch, train_tiny, tmp_path
):
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
    run = train_tiny(tmp_path, f"model.base_model={projected_folder}")
    extract(run, tmp_path / "small")
    assert load_base_model(str(tmp_path / "small")).projection is None


@pytest.mark.parametrize("frozen", [False, True])
def test_teacher_that_runs_in_every_step(
    frozen, configure, base, model_folder, build_all, dense_vecs
):
    settings = ("teacher.cache=false", "eval_batch_size=40", "model.l0_module=null")
    config = configure(*settings, f"model.freeze_embeddings={str(frozen).lower()}")
    model = build_all(config, base)[1]
    (batch,) = list(build_evaluators(config, base)[0].dataloader.dataloader)
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    outputs = torch.randn(40, 2, 32, generator=torch.Generator().manual_seed(0))
    cosines = (outputs.flatten(0, 1) * dense_vecs(ids, mask)).sum(-1)
    loss = model.loss({"dense_vecs": outputs}, batch)["distillation_alignment"]
    assert float(loss) == pytest.approx(1.0 - float(cosines.mean()), abs=1e-5)
    pairs = zip(*(m.backbone.embeddings.tables() for m in (model, model._teacher[0])), strict=True)
    assert [own.weight is other.weight for own, other in pairs] == [frozen] * 3
    if frozen:  # one table in memory for both
        return
    # It is another copy, which is neither trained nor saved with the student.
    with torch.no_grad():
        model.backbone.embeddings.word_embeddings.weight.zero_()
    again = model.loss({"dense_vecs": outputs}, batch)["distillation_alignment"]
    assert torch.equal(again, loss)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "heads"}


def test_algorithms(configure, build_all):
    config = configure("optimizer.max_grad_norm=0.5")
    _, model = build_all(config)
    base = build_base_model(config)
    loader = build_train_loader(config, base, build_teacher(config, base))
    stop = StopOnSignal("resume")
    schedule, clipping, guard, last = builders.build_algorithms(config, model, loader, stop)
    assert last is stop and clipping.guard is guard
    assert isinstance(schedule, PruningSchedule) and schedule.l0_module is model.l0_module
    assert schedule.warmup.to_timestring() == "0.5dur"
    assert isinstance(clipping, GroupGradientClipping) and clipping.max_norm == 0.5
    assert isinstance(guard, NonFiniteGuard) and not guard.skip
    none = ("optimizer.max_grad_norm=0", "model.l0_module=null", "optimizer.non_finite=skip")
    bare = configure(*none)
    guard, _ = builders.build_algorithms(bare, build_all(bare)[1], loader, stop)
    assert isinstance(guard, NonFiniteGuard) and guard.skip
    adaptive = configure("data.adapt_weights_interval=2ba", "data.adapt_batches=3")
    weights = builders.build_algorithms(adaptive, model, loader, stop)[0]
    assert isinstance(weights, SourceWeights)
    assert weights.dataset is loader.dataloader.dataset
    ((*probes,),) = weights.probes
    first = loader.dataloader.batch_sampler.rows_of(0, 0)[:3]
    expected = [[loader.dataloader.dataset[0, i]["score"] for i in rows] for rows in first]
    assert [batch["scores"].tolist() for batch in probes] == expected


@pytest.mark.parametrize(("terminal", "wanted"), [(False, True), (True, False), (True, True)])
def test_the_trainer_is_that_of_the_configuration(
    terminal, wanted, configure, base, build_all, monkeypatch, tmp_path
):
    settings = ("max_duration=7ba", "checkpoints_to_keep=6", "device_train_microbatch_size=4")
    config = configure(f"progress_bar={str(wanted).lower()}", *settings, "seed=9")
    _, model = build_all(config, base)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    loader, stop = (
        build_train_loader(config, base, build_teacher(config, base)),
        StopOnSignal("resume"),
    )
    evaluators = build_evaluators(config, base)
    trainer = builders.build_trainer(config, model, loader, evaluators, [], stop)
    state = trainer.state
    # The last one runs first after a batch: the others see each row of a table once.
    *_, last, rows = state.algorithms
    assert state.model is model and last is stop and isinstance(rows, RowGradients)
    assert state.max_duration.to_timestring() == "7ba"
    assert (state.run_name, state.precision, state.device.name) == ("tiny", Precision.FP32, "cpu")
    assert state.device_train_microbatch_size == 8  # the model itself cuts what it compares
    assert [evaluator.label for evaluator in state.evaluators] == ["dev"]
    (saver,) = (c for c in state.callbacks if isinstance(c, CheckpointSaver))
    assert (saver.folder, saver.num_checkpoints_to_keep) == (str(tmp_path / "runs" / "tiny"), 6)
    bars = [d for d in trainer.logger.destinations if isinstance(d, ProgressBarLogger)]
    assert bool(bars) == (terminal and wanted)
    (progress,) = (d for d in trainer.logger.destinations if isinstance(d, ProgressLog))
    assert progress.extra == {FILE_ONLY: terminal and wanted}
    assert progress.final_targets == model.l0_module.final_targets()
    trainer.close()
