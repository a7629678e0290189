"""The lines of a run: their text, when, on the console and in the log file."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bge_pruning.callbacks import progress_log
from bge_pruning.callbacks.progress_log import ProgressLog, render_line, render_time
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from tests.common.trainings import read_metrics

LOSSES = {
    "loss/train/total": 0.01234,
    "loss/train/distillation_alignment": 0.0101,
    "loss/train/lagrangian": 0.0,
}


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Messages reach caplog, whatever a test before has set up."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)


def read_log(folder: Path) -> list[tuple[str, str]]:
    text = (folder / "runs/tiny/train.log").read_text()
    return re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+) (.*)$", text, re.M)


def steps(folder: Path) -> list[list[str]]:
    lines = [message.split("  ") for _, message in read_log(folder)]
    return [parts for parts in lines if re.fullmatch(r"step \d+/\d+", parts[0])]


@pytest.mark.parametrize(
    ("duration", "interval", "expected"),
    [("5ba", "2ba", ["2/5", "4/5", "5/5"]), ("7ba", "1ep", ["5/7", "7/7"])],
)
def test_a_line_at_the_interval_and_at_the_end(duration, interval, expected, tmp_path, train_tiny):
    times = (f"max_duration={duration}", f"log_interval={interval}")
    train_tiny(tmp_path, *times, "eval_interval=3ep", "save_interval=3ep")
    assert [parts[0] for parts in steps(tmp_path)] == [f"step {step}" for step in expected]


@pytest.mark.parametrize("micro", [8, 4])
def test_losses_and_sparsities_are_those_that_are_logged(micro, tmp_path, train_tiny):
    sizes = ("loss.distillation_similarity=0", f"device_train_microbatch_size={micro}")
    run = train_tiny(tmp_path, "max_duration=3ba", *sizes)
    rows = [row["metrics"] for row in read_metrics(run)]
    losses = [row for row in rows if "loss/train/total" in row]
    gates = [row for row in rows if "pruning/lambda_1/head" in row]
    for parts, loss, gate in zip(steps(tmp_path), losses, gates, strict=True):
        held = loss["loss/train/lagrangian"] + loss["loss/train/binarization"]
        assert parts[1].startswith(f"loss {loss['loss/train/total'] - held:.4f} (")
        for name in ("distillation_alignment", "sts_regression"):
            shown = f"{name.removeprefix('distillation_')} {loss[f'loss/train/{name}']:.3f}"
            assert shown in parts[1]
        assert parts.pop(2).startswith(f"constraint {held:.3f}")
        short = {"heads": "head", "hidden": "hidden", "units": "intermediate", "layers": "layer"}
        pairs = [
            f"{name} {gate[f'pruning/expected_sparsity/{axis}']:.3f}"
            f" of {gate[f'pruning/target_sparsity/{axis}']:.3f}"
            for name, axis in short.items()
        ]
        assert parts[2].removeprefix("sparsity ").split(", ") == pairs
        assert re.fullmatch(r"\d+ texts/s", parts[3])


def test_the_learning_rate_is_that_of_the_weights(tmp_path, train_tiny):
    train_tiny(tmp_path, "scheduler.name=constant", "max_duration=3ba")
    assert [parts[-2] for parts in steps(tmp_path)] == ["lr 0.0e+00", "lr 1.0e-03", "lr 1.0e-03"]


@pytest.fixture
def minutes(monkeypatch):
    """Makes every training step take one minute by the log's clock."""
    clock = SimpleNamespace(now=1000.0)
    loss = ComposerBGEM3.loss

    def slow(self, outputs, batch):
        clock.now += 60.0
        return loss(self, outputs, batch)

    monkeypatch.setattr(ComposerBGEM3, "loss", slow)
    monkeypatch.setattr(progress_log, "time", SimpleNamespace(monotonic=lambda: clock.now))


@pytest.mark.usefixtures("minutes")
@pytest.mark.parametrize(("duration", "last"), [("4ba", 4), ("1ep", 5)])
def test_time_left(duration, last, tmp_path, train_tiny):
    intervals = ("eval_interval=1ep", "save_interval=1ep")
    train_tiny(tmp_path, f"max_duration={duration}", *intervals)
    left = [f"left {n} min" if n > 1 else f"left {60 * n} s" for n in range(last - 1, -1, -1)]
    assert [parts[-1] for parts in steps(tmp_path)] == left


@pytest.mark.usefixtures("minutes")
def test_time_left_of_a_resumed_run_counts_its_own_steps(tmp_path, train_tiny):
    train_tiny(tmp_path, "max_duration=4ba")
    train_tiny(tmp_path, "max_duration=7ba", "autoresume=true")
    assert [parts[-1] for parts in steps(tmp_path)[4:]] == ["left 2 min", "left 60 s", "left 0 s"]


def test_the_file_tells_the_whole_story(tmp_path, train_tiny):
    settings = ("max_duration=2ba", "save_interval=2ba")
    train_tiny(tmp_path, *settings)
    with pytest.MonkeyPatch.context() as patch:

        def die(self, outputs, batch):
            raise RuntimeError("the machine is gone")

        patch.setattr(ComposerBGEM3, "loss", die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train_tiny(tmp_path, "max_duration=4ba", "autoresume=true")
    train_tiny(tmp_path, "max_duration=3ba", "autoresume=true")
    story = [f"{level} {message}" for level, message in read_log(tmp_path)]
    patterns = [
        r"INFO run \S+/runs/tiny \(prune\): seed 3, ranks 1, code .*torch 2\.",
        r"INFO training starts, to step 2$",
        r"INFO step 1/2  loss",
        r"INFO step 2/2  loss",
        r"INFO step 2 \| evaluation \| dev/cosine_spearman",
        r"INFO checkpoint ba2-rank0\.pt written$",
        r"INFO trained to the end$",
        r"INFO run ",
        r"INFO training resumes after step 2, to step 4$",
        r"ERROR ended by RuntimeError: the machine is gone$",
        r"INFO training resumes after step 2, to step 3$",
        r"INFO step 3/3  loss",
        r"INFO checkpoint ba3-rank0\.pt written$",
        r"INFO trained to the end$",
    ]
    for pattern in patterns:  # in this order
        while not re.match(pattern, story[0]):
            story.pop(0)
            assert story, f"no line for {pattern}"
    assert sum("checkpoint ba3" in line for line in story) <= 1


def test_with_a_bar_lines_are_for_the_file_alone_and_other_ranks_say_nothing(monkeypatch, caplog):
    assert not ProgressLog("1ba", {}).extra["file_only"]
    monkeypatch.setattr(progress_log.dist, "get_global_rank", lambda: 1)
    log = ProgressLog("1ba", {}, on_console=False)
    with caplog.at_level(logging.INFO):
        log.batch_end(SimpleNamespace(), None)
        progress_log.log.warning("shown so that the logger is awake", extra=log.extra)
    (record,) = caplog.records
    assert record.file_only


def constraint(axis: str, expected: float, target: float) -> dict[str, float]:
    values = {"expected": expected, "target": target}
    return {f"pruning/{kind}_sparsity/{axis}": value for kind, value in values.items()}


def test_the_line_of_a_budget_and_its_times():
    data = {"data/texts_per_second": 210.4, "data/loss/only": 0.3}
    metrics = {**LOSSES, **constraint("encoder", 0.31, 0.35), **data}
    assert render_line(150, 600, metrics, {"encoder": 0.5}, 1.2e-4, 180.0) == (
        "step 150/600  loss 0.0123  constraint 0.000  "
        "sparsity 0.310 of 0.350 (target 0.500)  210 texts/s  lr 1.2e-04  left 3 min"
    )
    line = render_line(7, 8, {"loss/train/total": 0.5}, {}, 1e-3, 30)
    assert line == "step 7/8  loss 0.5000  lr 1.0e-03  left 30 s"
    seconds = (0.0, 99.0, 100.0, 5900.0, 6000.0, 7500.0, 180_000.0)
    texts = ["0 s", "99 s", "2 min", "98 min", "1 h 40 min", "2 h 05 min", "50 h 00 min"]
    assert [render_time(value) for value in seconds] == texts


SHAPE = constraint("head", 0.1, 0.2) | constraint("intermediate", 0.3, 0.4)
SOURCES = {"data/loss/b": 0.25, "data/loss/a": 0.5, "numerics/skipped_steps": 3}


@pytest.mark.parametrize(
    ("metrics", "targets", "part"),
    [
        # After the warm-up the target is said once.
        (constraint("encoder", 0.49, 0.5), ["encoder"], "sparsity 0.490 of 0.500  lr"),
        (SHAPE, ["head", "intermediate"], "  sparsity heads 0.100 of 0.200, units 0.300 of 0.400"),
        (SOURCES, [], "  by source a 0.500, b 0.250  lr 1.0e-03  skipped 3  left 30 s"),
        ({}, ["head"], "constraint 0.000  lr"),  # one whose sparsity nobody logs
        # What the gates are held by is not the task's.
        (
            {
                "loss/train/total": 5.25,
                "loss/train/lagrangian": 4.0,
                "loss/train/binarization": 1.0,
            },
            [],
            "  loss 0.2500  constraint 5.000 (lagrangian 4.000, binarization 1.000)  lr",
        ),
    ],
)
def test_parts_of_the_line(metrics, targets, part):
    assert part in render_line(7, 8, LOSSES | metrics, dict.fromkeys(targets, 0.5), 1e-3, 30)
