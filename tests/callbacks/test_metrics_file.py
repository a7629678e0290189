"""The file of all metrics: what a line holds, and what a resumed run does to the lines."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import State, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.utils import dist

from bge_pruning.callbacks.loggers import MetricsFile


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "runs" / "tiny" / "metrics.jsonl"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def at_batch(batch: int) -> State:
    state = State(torch.nn.Linear(1, 1), 0, "run", DeviceCPU(), max_duration="9ba")
    state.timestamp = Timestamp(batch=batch)
    return state


def test_one_line_per_call_in_a_file_that_a_run_starts_empty(path):
    file = MetricsFile(path)
    exact = {"third": 1 / 3, "tiny": 5e-324, "count": 302_309_376}
    file.log_metrics(exact, step=3)
    file.log_metrics({"метрика": 1}, step=4)
    assert path.read_bytes().endswith(b"\n")
    assert rows(path) == [{"batch": 3, "metrics": exact}, {"batch": 4, "metrics": {"метрика": 1.0}}]
    log_steps(path, 1, 2)
    file = MetricsFile(path)
    file.fit_start(at_batch(0), None)
    file.log_metrics({"a": 1.5}, step=1)
    assert rows(path) == [{"batch": 1, "metrics": {"a": 1.5}}]


def test_numbers_of_every_kind_and_nothing_else(path):
    half = torch.tensor(0.5)
    numbers = [0.5, half, half[None, None], half.bfloat16(), np.float64(0.5), np.float32(0.5)]
    numbers.append(torch.tensor(0.5, requires_grad=True))
    others = ["text", None, [1.0], torch.zeros(2), torch.zeros(0), {"a": 1.0}]
    values = {str(n): value for n, value in enumerate([*numbers, *others])}
    MetricsFile(path).log_metrics(values, step=1)
    assert rows(path) == [{"batch": 1, "metrics": {str(n): 0.5 for n in range(len(numbers))}}]
    MetricsFile(path).log_metrics({"a": torch.tensor(math.nan), "b": math.inf}, step=1)
    metrics = rows(path)[1]["metrics"]  # a loss that is no number is seen
    assert math.isnan(metrics["a"]) and metrics["b"] == math.inf


def test_other_ranks_write_and_drop_nothing(path, monkeypatch):
    Logger(at_batch(5), [MetricsFile(path)]).log_metrics({"a": 1.0})
    assert rows(path)[0]["batch"] == 5  # of Composer's clock
    before = path.read_bytes()
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    file = MetricsFile(path)
    file.log_metrics({"a": 2.0}, step=1)
    resume(file, 0, 0)
    assert path.read_bytes() == before


def log_steps(path: Path, *steps: int) -> None:
    file = MetricsFile(path)
    for step in steps:
        file.log_metrics({"a": step}, step=step)


def resume(file: MetricsFile, size: int, batch: int) -> None:
    file.load_state_dict({"bytes": size})
    file.fit_start(at_batch(batch), None)


def test_a_resumed_run_drops_what_came_after_the_checkpoint_only(path):
    log_steps(path, 1, 2)
    saved = MetricsFile(path).state_dict()
    log_steps(path, 2, 3)  # the metrics of step 2 that came after its checkpoint, and a step
    resumed = MetricsFile(path)
    resume(resumed, saved["bytes"], 2)
    assert [row["batch"] for row in rows(path)] == [1, 2]
    resumed.log_metrics({"a": 3}, step=3)
    assert [row["batch"] for row in rows(path)] == [1, 2, 3]


def test_a_line_that_was_cut_is_dropped_after_text_of_several_bytes(path, tmp_path):
    MetricsFile(path).log_metrics({"собака 🐈": 1.0}, step=1)
    torch.save(MetricsFile(path).state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved == {"bytes": len(path.read_bytes())}
    with path.open("a") as file:
        file.write('{"batch": 2, "met')
    resume(MetricsFile(path), saved["bytes"], 1)
    assert rows(path) == [{"batch": 1, "metrics": {"собака 🐈": 1.0}}]


def test_nothing_is_dropped_where_there_is_nothing_to_repeat(path):
    assert MetricsFile(path).state_dict() == {"bytes": 0}
    resume(MetricsFile(path), 10, 0)
    assert not path.exists()
    log_steps(path, 1, 2)
    before = path.read_bytes()
    MetricsFile(path).load_state_dict({"bytes": 5})  # a finished run is only loaded
    resume(MetricsFile(path), 10_000, 1)  # shorter than recorded
    MetricsFile(path).fit_start(at_batch(2), None)
    assert path.read_bytes() == before
