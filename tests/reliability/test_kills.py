"""A run that is killed at any moment goes on, and ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.reliability

STEPS = ("max_duration=12ba", "save_interval=2ba", "eval_interval=3ba", "log_interval=1ba")
GATES = ("model.l0_module.init_order=activation", "model.l0_module.binarization=5")
MOMENTS, EVENTS, TERMINATED = 12, 12, 3
# What depends on the clock of the wall.
TIMES = ("eval/seconds", "data/rows_per_second", "data/texts_per_second")


def make_kills() -> list[dict]:
    """Random moments of the run's whole life, and random things that it does to its folder."""
    numbers = random.Random(20261125)
    kills = [{"kind": "moment", "share": numbers.uniform(0.3, 0.98)} for _ in range(MOMENTS)]
    kills += [{"kind": "event", "share": numbers.random()} for _ in range(EVENTS)]
    return kills + [{"kind": "terminate", "share": 0.72 + 0.07 * i} for i in range(TERMINATED)]


def sources(path: Path) -> tuple[str, ...]:
    """Two sources whose shares change in the run; dropout, which draws random numbers."""
    pairs, texts = (
        f"{{name: {kind}, kind: {kind}, path: {path}}}" for kind in ("sts", "sentences")
    )
    mixed = (f"data.train=[{pairs}, {texts}]", "data.adapt_weights_interval=3ba")
    options = ("model.dropout=0.1", "scheduler.name=cosine", "teacher.cache=true")
    return (*mixed, "data.adapt_batches=1", *options)


@pytest.fixture(scope="module")
def killed(make_yaml, sts_csv, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of all runs, and what became of each."""
    place = tmp_path_factory.mktemp("killed")
    job = {
        "arguments": [str(make_yaml(place)), *STEPS, *GATES, *sources(sts_csv)],
        "runs": str(place / "runs"),
        "report": str(place / "report.jsonl"),
        "kills": make_kills(),
    }
    (place / "runs").mkdir()
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    process = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "kill_driver.py"), str(place / "job.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    report = (place / "report.jsonl").read_text(encoding="utf-8")
    return place / "runs", [json.loads(line) for line in report.splitlines()]


def rows_of(run: Path) -> dict[tuple[int, str], float]:
    """Every logged value; the last one of a key and step is what a reader sees."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[tuple[int, str], float] = {}
    for row in rows:
        for key, value in row["metrics"].items():
            if key not in TIMES:
                assert (row["batch"], key) not in found, f"{key} of step {row['batch']} twice"
                found[row["batch"], key] = value
    return found


def test_every_killed_run_ends_as_the_whole_one(killed, load_state, assert_same, summary):
    runs, rows = killed
    whole, logged = load_state(runs / "whole"), rows_of(runs / "whole")
    for row in rows:
        run = runs / row["name"]
        assert row["again"] == 0, Path(f"{run}.log").read_text()
        state = load_state(run)
        for part in ("model", "optimizers", "schedulers", "dataset_state"):
            assert_same(state[part], whole[part], 0.0, f"{row}: {part}")
        assert rows_of(run) == logged, row
    survived = [row for row in rows if row["code"] == -9]
    assert len(survived) >= 20
    summary["kills survived"] = len(survived)
    assert len({len(row["checkpoints"]) for row in survived}) > 1  # before the first, and later


def test_told_to_stop_it_saves_and_says_so(killed, summary):
    runs, rows = killed
    told = [row for row in rows if row["kind"] == "terminate"]
    saved = 0
    for row in told:
        assert row["code"] in (143, -15, 0), row  # while it trains; before; when it has ended
        text = Path(f"{runs / row['name']}.log").read_text()
        if "error: stopped by SIGTERM after" in text:
            assert row["code"] == 143 and row["checkpoints"], row
            saved += 1
    assert saved >= 1
    summary["stopped by SIGTERM and gone on"] = saved
