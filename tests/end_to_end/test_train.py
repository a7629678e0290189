"""Training on the tiny model: what the numbers do, what is kept, what is refused."""

import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

from bge_pruning.callbacks.pruning_callback import PruningCallback
from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.models.encoder_shape import EncoderShape, forward_flops
from bge_pruning.models.objective import LearnedTemperature
from bge_pruning.train import main, train
from bge_pruning.training import builders, run_report
from bge_pruning.training.run_start import check_run
from tests.common.trainings import TARGET, extract_json, logged, losses, read_json

# Adam turns a gradient of pure rounding error (that of the key biases is 0 in exact arithmetic)
# into a full step; an epsilon above it lets runs be compared that add in another order.
DAMPED = "optimizer.eps=1e-4"
STS_ONLY = ("loss.distillation_alignment=0", "loss.distillation_similarity=0")
THREE = ("loss.distillation_sparse=1", "loss.distillation_colbert=1", "loss.cosent=0.1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, train_tiny) -> Path:
    """Eight uninterrupted steps, more than an epoch, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("reference")
    return train_tiny(folder, "max_duration=8ba", "save_interval=1ba", "checkpoints_to_keep=9")


@pytest.fixture
def assert_same_run(load_state, assert_same):
    """Compares all that training changes: weights, gates, multipliers, optimizer, clock."""

    def same(a: Path, b: Path, atol: float = 0.0, parts=("model", "optimizers", "schedulers")):
        first, second = load_state(a), load_state(b)
        for part in parts:
            assert_same(first[part], second[part], atol, part)

    return same


def test_mixed_precision_on_a_cpu_is_no_fp32(reference, tmp_path, train_tiny):
    run = train_tiny(tmp_path, "max_duration=2ba", "precision=amp_bf16", "device=cpu")
    exact, mixed = losses(reference)[0], losses(run)[0]
    assert exact != mixed
    assert mixed == pytest.approx(exact, rel=0.02)


def test_trains_and_keeps_what_a_person_needs(reference, load_state, model_folder):
    names = {path.name for path in reference.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "latest-rank0.pt", "ba8-rank0.pt"} <= names
    assert load_config([reference / "config.yaml"]).max_duration == "8ba"
    state = load_state(reference)
    assert state["timestamp"]["Timestamp"]["batch"] == 8
    parts = ("sts_regression", "distillation_alignment", "distillation_similarity")
    parts += ("lagrangian", "binarization")
    for step, total in enumerate(losses(reference)):
        assert total == pytest.approx(sum(losses(reference, part)[step] for part in parts))
    assert len(losses(reference)) == 8
    assert set(logged(reference, "metrics/dev/cosine_spearman")) == {2, 4, 6, 8}
    for name in ("sparse_linear", "colbert_linear"):  # no loss is of their outputs
        before = torch.load(model_folder / f"{name}.pt", weights_only=True)
        assert torch.equal(state["model"][f"heads.{name}.weight"], before["weight"])


def test_loss_goes_down_on_a_batch_it_sees_again(tmp_path, train_tiny, sts_csv):
    few = tmp_path / "few.csv"
    few.write_text("".join(sts_csv.read_text().splitlines(keepends=True)[:8]))
    run = train_tiny(
        tmp_path,
        *STS_ONLY,
        "max_duration=12ba",
        "model.l0_module=null",
        f"data.train=[{{name: few, kind: sts, path: {few}}}]",
    )
    values = losses(run)
    assert values[-1] < 0.5 * values[0]


def test_same_seed_twice_is_the_same_to_the_bit(
    tmp_path, train_tiny, reference, assert_same_run, load_state
):
    again = train_tiny(tmp_path, "max_duration=8ba")
    assert_same_run(reference, again)
    assert losses(reference) == losses(again)
    other = train_tiny(tmp_path / "other", "max_duration=8ba", "seed=4")
    name = "backbone.encoder.layer.0.output.dense.weight"
    assert not torch.equal(load_state(other)["model"][name], load_state(again)["model"][name])


# Composer's word for an epoch that had been trained to its last batch when the run ended.
@pytest.mark.filterwarnings("ignore:No batches were trained for global rank:UserWarning")
@pytest.mark.parametrize("stop", [4, 5], ids=["inside an epoch", "at the end of an epoch"])
def test_interrupted_and_resumed_equals_uninterrupted(
    stop, tmp_path, train_tiny, reference, assert_same_run, monkeypatch
):
    overrides = ("max_duration=8ba", "save_interval=1ba", "checkpoints_to_keep=9")
    batch_end = PruningCallback.batch_end

    def die(self, state, logger):
        batch_end(self, state, logger)
        if state.timestamp.batch.value == stop + 1:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(PruningCallback, "batch_end", die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train_tiny(tmp_path, *overrides)
    run = tmp_path / "runs" / "tiny"
    assert (run / "latest-rank0.pt").resolve().name == f"ba{stop}-rank0.pt"
    assert train_tiny(tmp_path, *overrides, "autoresume=true") == run
    assert_same_run(reference, run)
    assert losses(run) == losses(reference)  # the line of the step done twice is there once


@pytest.fixture(scope="module")
def test_longer_run_goes_on_from_a_finished_one(tmp_path, train_tiny, assert_same_run):
    """Eight steps at once; four, and four more."""
    l0 = "model.l0_module."  # nothing of it follows the length that a part is told
    fixed = ("scheduler.name=constant", f"{l0}lagrangian_warmup_steps=2ba", f"{l0}binarization=0")
    whole = train_tiny(tmp_path / "whole", *fixed, "max_duration=8ba")
    train_tiny(tmp_path / "parts", *fixed, "max_duration=4ba")
    parts = train_tiny(tmp_path / "parts", *fixed, "max_duration=8ba", "autoresume=true")
    assert_same_run(whole, parts)
    for key in ("pruning/lambda_1/hidden", "metrics/dev/cosine_spearman"):
        assert logged(parts, key) == logged(whole, key)


def test_a_finished_run_is_left_as_it_is(train_tiny, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)
    caplog.set_level("INFO", "bge_pruning")
    run = train_tiny(tmp_path, "max_duration=2ba")
    names = ("*.pt", "metrics.jsonl")
    before = {path: path.stat().st_mtime_ns for name in names for path in run.glob(name)}
    assert train_tiny(tmp_path, "max_duration=2ba", "autoresume=true") == run
    assert "tiny is trained to its end already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_watchers_and_evaluation_leave_training_alone(
    tmp_path, train_tiny, reference, assert_same_run, monkeypatch
):
    monkeypatch.setattr(builders, "build_callbacks", lambda *_: [])
    monkeypatch.setattr(builders, "build_loggers", lambda *_: [])
    bare = train_tiny(tmp_path, "max_duration=8ba", "data.eval=[]")
    assert_same_run(reference, bare)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_multipliers_ascend(scheduler, tmp_path, train_tiny):
    # All gates start open, so s < t: the maximum of lambda_1 (s - t) lies at negative lambda_1,
    # which in turn drives the gates shut. lambda_2 (s - t)^2 only ever grows with lambda_2.
    run = train_tiny(
        tmp_path,
        "model.l0_module.lagrangian_warmup_steps=0ba",
        "model.l0_module.binarization=0",
        f"scheduler.name={scheduler}",
        "scheduler.alpha_f=0.0",
        "max_duration=16ba",
        *STS_ONLY,
        "loss.sts_regression=1e-4",  # the constraint alone moves the gates
    )
    for axis in ("head", "hidden", "intermediate", "layer"):
        expected = logged(run, f"pruning/expected_sparsity/{axis}")
        target = logged(run, f"pruning/target_sparsity/{axis}")
        lambdas = logged(run, f"pruning/lambda_1/{axis}")
        assert all(expected[batch] < target[batch] for batch in expected)
        assert lambdas[3] < 0.0  # the learning rate of the first two steps is 0
        # never back: no schedule flips the sign
        assert all(lambdas[batch + 1] <= lambdas[batch] for batch in range(1, 16))
        assert logged(run, f"pruning/lambda_2/{axis}")[16] > 0.0
        assert expected[16] > expected[1]


def test_multipliers_turn_when_too_much_is_pruned(tmp_path, train_tiny):
    # Gates start half closed and the target is nearly nothing: s > t, so lambda_1 goes up.
    run = train_tiny(
        tmp_path,
        "model.l0_module.lagrangian_warmup_steps=0ba",
        "model.l0_module.init_mean=-0.5",
        "model.l0_module.target_model={intermediate_size: 63}",
        "max_duration=3ba",
    )
    assert logged(run, "pruning/lambda_1/intermediate")[3] > 0.0


# Splitting the batch


@pytest.mark.parametrize(
    ("more", "sizes"),
    [
        # 3 + 3 + 2: unequal parts count by their size.
        ((*STS_ONLY, "loss.distillation_alignment=1"), (4, 3)),
        (("loss.cosent=0.1",), (3,)),
    ],
    ids=["of each text", "over the batch"],
)
def test_microbatches_equal_the_whole_batch(more, sizes, tmp_path, train_tiny, assert_same_run):
    overrides = (*more, DAMPED, "max_duration=3ba")
    whole = train_tiny(tmp_path / "whole", *overrides)
    for size in sizes:
        split = train_tiny(tmp_path / str(size), *overrides, f"device_train_microbatch_size={size}")
        assert_same_run(whole, split, atol=1e-5, parts=("model",))
        assert losses(split) == pytest.approx(losses(whole), abs=1e-5)


# Teacher


@pytest.mark.parametrize(
    ("more", "names", "atol"),
    [
        ((), "dense_vecs", 1e-5),
        # Multi-vectors are cached in half precision.
        (THREE, "dense_vecs token_weights colbert_vecs", 1e-3),
    ],
    ids=["dense", "all"],
)
def test_teacher_on_the_fly_equals_cached(more, names, atol, tmp_path, train_tiny, assert_same_run):
    overrides = (DAMPED, *more, "max_duration=3ba")
    cached = train_tiny(tmp_path / "cached", *overrides, "teacher.cache=true")
    files = (tmp_path / "cached/processed").glob("teacher-*/*.jsonl")
    assert {path.stem.rsplit("-", 1)[0] for path in files} == set(names.split())
    live = train_tiny(tmp_path / "live", *overrides, "teacher.cache=false")
    assert not list((tmp_path / "live/processed").glob("teacher-*"))
    assert losses(live) == pytest.approx(losses(cached), abs=atol)
    if not more:
        assert_same_run(cached, live, atol=atol, parts=("model",))


def test_three_outputs_are_distilled_and_kept(tmp_path, train_tiny, load_state, model_folder):
    run = train_tiny(tmp_path, *THREE, "max_duration=8ba", "model.l0_module=null")
    for part in ("distillation_sparse", "distillation_colbert", "cosent"):
        assert len(losses(run, part)) == 8
    # The student starts as its teacher, and the other parts of the loss pull it away.
    assert losses(run, "distillation_sparse")[0] == pytest.approx(0.0, abs=1e-5)
    assert losses(run, "distillation_colbert")[0] == pytest.approx(0.0, abs=1e-3)
    state = load_state(run)["model"]
    for name in ("sparse_linear", "colbert_linear"):
        before = torch.load(model_folder / f"{name}.pt", weights_only=True)
        assert not torch.equal(state[f"heads.{name}.weight"], before["weight"])


# Queries with passages


@pytest.fixture
def contrastive(contrastive_jsonl) -> tuple[str, ...]:
    return (
        f"data.train=[{{name: q, kind: contrastive, path: {contrastive_jsonl}}}]",
        "data.negatives=1",
        "loss={sts_regression: 0.0, distillation_alignment: 0.5, distillation_similarity: 0.0,"
        " distillation_colbert: 0.5, contrastive: 1.0, self_distillation: 0.5, temperature: 0.1}",
    )


def test_contrastive_loss_goes_down(tmp_path, train_tiny, contrastive):
    overrides = ("model.l0_module=null", "max_duration=10ep", "loss.self_distillation=0")
    intervals = ("eval_interval=10ep", "save_interval=10ep")
    run = train_tiny(tmp_path, *contrastive, *overrides, *intervals)
    values = losses(run, "contrastive")
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


def test_queries_with_passages_train_all_outputs_and_a_temperature_if_asked_for(
    tmp_path, train_tiny, contrastive, load_state
):
    fixed = train_tiny(tmp_path / "fixed", *contrastive, "max_duration=8ba")
    assert len(losses(fixed, "contrastive")) == len(losses(fixed, "self_distillation")) == 8
    assert "temperature.raw" not in load_state(fixed)["model"]
    learned = train_tiny(tmp_path, *contrastive, "loss.learn_temperature=true", "max_duration=6ba")
    start = LearnedTemperature(0.1).raw.detach()
    assert abs(float(load_state(learned)["model"]["temperature.raw"] - start)) > 1e-3
    for run in (fixed, learned):
        info = extract_json(run, tmp_path / f"{run.parents[1].name}-small")
        assert info["largest_difference"] <= 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.contrastive_outputs=[dense]", "loss.self_distillation needs an ensemble of two"),
        ("loss.sts_regression=1", "loss.sts_regression needs data.train of kind sts"),
        ("loss.contrastive_outputs=[dens]", r"contrastive_outputs\[0\] 'dens' is not one of"),
    ],
)
def test_contrastive_objectives_that_are_refused(override, message, tiny_yaml, contrastive):
    with pytest.raises(ConfigError, match=message):
        train(load_config([tiny_yaml], [*contrastive, override]))


# Checkpoints hold what extraction needs


def test_extracted_model_has_the_targets_shape(reference, tmp_path):
    info = extract_json(reference, tmp_path / "small")
    assert TARGET.items() <= info["shape"].items()
    assert info["largest_difference"] <= 1e-5
    assert info["batches"] == {"prune": 8}
    assert read_json(tmp_path / "small" / "config.json")["num_hidden_layers"] == 3


def test_budget_trains_and_extracts(tmp_path, train_tiny):
    run = train_tiny(
        tmp_path, "model.l0_module.target_model=null", "model.l0_module.target_density=0.6"
    )
    info = extract_json(run, tmp_path / "small")
    counts = info["parameters"]
    assert counts["extracted"]["encoder"] / counts["source"]["encoder"] == pytest.approx(
        0.6, rel=0.005
    )
    assert set(logged(run, "pruning/lambda_1/encoder")) == {1, 2, 3, 4}


def test_a_speedup_trains_and_extracts(tmp_path, train_tiny):
    overrides = ("target_model=null", "target_speedup=1.5", "target_length=512")
    run = train_tiny(tmp_path, *(f"model.l0_module.{override}" for override in overrides))
    info = extract_json(run, tmp_path / "small")
    source, small = (EncoderShape(**info[key]) for key in ("source_shape", "shape"))
    fewer = forward_flops(source, [512]) / forward_flops(small, [512])
    assert fewer == pytest.approx(1.5, rel=0.01)
    assert set(logged(run, "pruning/lambda_1/operations")) == {1, 2, 3, 4}
    rows = info["constraint"]
    assert rows["operations"]["target_sparsity"] == pytest.approx(1 / 3)
    assert rows["operations"]["realised_sparsity"] == pytest.approx(1 / 3, abs=0.01)
    assert rows["encoder"]["target_sparsity"] == rows["encoder"]["realised_sparsity"]


def test_recovery_trains_the_extracted_model(tmp_path, make_yaml, train_tiny):
    run = train_tiny(tmp_path, *THREE)
    config = load_config([make_yaml(tmp_path)], ["stage=recover", *THREE])
    extract_json(run, Path(config.model.base_model))
    run = train(config)
    info = extract_json(run, tmp_path / "recovered")
    assert TARGET.items() <= info["shape"].items()
    assert info["largest_difference"] <= 1e-5
    assert info["batches"] == {"prune": 4, "recover": 4}
    assert info["parameters"]["source"]["encoder"] > info["parameters"]["extracted"]["encoder"]
    assert len(losses(run, "distillation_colbert")) == 4


# The run folder


@pytest.fixture
def used(tmp_path, reference) -> Path:
    """A run folder that holds a run."""
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(reference, run, symlinks=True)
    return run


def contents(folder: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}


def test_run_folder_in_use_is_replaced_only_if_asked_to(used, tmp_path, train_tiny):
    before = contents(used)
    message = "holds a run already and is kept. To fix, set another run_name"
    with pytest.raises(FileExistsError, match=message):
        train_tiny(tmp_path)
    assert contents(used) == before
    assert train_tiny(tmp_path, "overwrite=true", "max_duration=1ba") == used
    assert not (used / "ba8-rank0.pt").exists()
    assert len(losses(used)) == 1
    then = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    said = rf"WARNING replacing the run of {then} in {re.escape(str(used))}$"
    assert re.search(said, (used / "train.log").read_text(), re.MULTILINE)
    shutil.rmtree(used)
    used.mkdir()
    (used / "thesis.txt").write_text("ten years of work")
    with pytest.raises(FileExistsError, match="only if it holds a run"):
        train_tiny(tmp_path, "overwrite=true")
    assert (used / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.parametrize(
    ("prog", "best", "command"),
    [
        ("bge-pruning prune", True, "bge-pruning extract {run} {pruned} --best"),
        (
            "python -m bge_pruning.train",
            False,
            "python scripts/extract_pruned_model.py {run} {pruned}",
        ),
    ],
)
def test_a_training_ends_with_its_report_the_next_command_and_unfinished_gates(
    prog, best, command, tiny_yaml, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_report, "write_report", lambda folder, **_: folder / "report.md")
    words = ["evaluation.keep_best=dev/cosine_spearman"] if best else []
    assert main([str(tiny_yaml), "max_duration=2ba", *words], prog) == 0
    run, pruned = tmp_path / "runs" / "tiny", tmp_path / "results" / "tiny" / "pruned_model"
    lines = (run / "train.log").read_text().splitlines()[-4:]
    last = [line.split(" ", 3)[3] for line in lines]
    assert last[0] == "trained to the end"
    assert last[1] == f"the report of the training is {run}/report.md"
    assert last[2] == f"next: {command.format(run=run, pruned=pruned)}"
    assert last[3].startswith("the gates were far from what is cut, 'head' by ")
    assert lines[3].split()[2] == "WARNING"


def test_nothing_is_made_when_the_target_is_wrong(tiny_yaml, tmp_path, capfd):
    assert main([str(tiny_yaml), "model.l0_module.target_model.n_heads=2"]) == 2
    assert "transformers could not load the result" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "processed").exists()


def test_a_warm_up_of_another_unit_is_compared_once_there_are_data(tiny_yaml, tmp_path):
    overrides = ["max_duration=1ep", "scheduler.t_warmup=99ba"]
    message = "scheduler.t_warmup 99ba is not over when the run ends, after max_duration 1ep"
    with pytest.raises(ConfigError, match=message):
        train(load_config([tiny_yaml], overrides))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["run_folder", "data.processed_folder", "loggers.folder"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(key, tiny_yaml, tmp_path):
    """A file stands in the way, which the superuser of a container cannot pass either."""
    (tmp_path / "file").write_text("")
    overrides = [f"{key}={tmp_path}/file/inside", "loggers.file=true"]
    message = rf"^{key} .*inside cannot be written: .*file is not a folder .*To fix, choose another"
    with pytest.raises(PermissionError, match=message):
        check_run(load_config([tiny_yaml], overrides))


def test_what_the_machine_cannot_do_is_refused_at_the_start(tiny_yaml, monkeypatch):
    config = load_config([tiny_yaml], ["precision=amp_fp16", "device=cpu"])
    with pytest.raises(ConfigError, match="precision amp_fp16 needs a GPU: .* To fix, set"):
        check_run(config)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    message = r"run_folder .* cannot be written: .* To fix, choose"
    with pytest.raises(PermissionError, match=message):
        check_run(load_config([tiny_yaml]))
