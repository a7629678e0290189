"""What a finished training leaves for people, in its folder and on W&B."""

import json
import logging
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb

from bge_pruning.config.load import load_config
from bge_pruning.model_io.run_checkpoints import write_gates
from bge_pruning.training import run_report
from bge_pruning.training.run_report import log_results, training_command
from bge_pruning.utils.records import EvaluationRecord
from tests.common.trainings import logged

PICTURES = {"gates", "constraint", "multipliers", "training"}
SENT = {f"report/{name}" for name in {*PICTURES, "page"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_tiny) -> Path:
    """The folder of a run of four steps, with its report."""
    return train_tiny(tmp_path_factory.mktemp("reported"), report=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_leaves_its_report(run):
    files = {"gates.npz", "versions.json", "commands.txt", "report.md", "report.html"}
    assert {f"{name}.png" for name in PICTURES} | files <= names(run)
    assert not [name for name in names(run) if "tmp" in name]
    text = (run / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Training run tiny\n\nAfter 4 steps of pruning from ")
    for words in ("## What was pruned", "## Training", "| sts regression |", "| dev |"):
        assert words in text
    assert (run / "config.yaml").read_text(encoding="utf-8").strip() in text
    assert "| torch | " in text and "Seed of the run 3." in text
    versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    assert versions["torch"] and versions["mosaicml"]


def test_its_gates_are_those_of_the_checkpoint(run, tmp_path):
    write_gates(run, tmp_path / "gates.npz")
    with np.load(run / "gates.npz") as written, np.load(tmp_path / "gates.npz") as expected:
        assert set(written.files) == set(expected.files)
        for name in written.files:
            np.testing.assert_array_equal(written[name], expected[name])


def test_its_command_trains_the_same_beside_it(run):
    (line,) = (run / "commands.txt").read_text(encoding="utf-8").splitlines()
    python, option, module, *arguments = shlex.split(line)
    assert (python, option, module) == ("python", "-m", "bge_pruning.train")
    again = load_config(arguments[:1], arguments[1:])
    config = load_config([run / "config.yaml"])
    assert again.run_folder == f"{run}-again"
    again.run_folder = config.run_folder
    assert again == config


def test_the_command_of_a_recovery_and_of_several_ranks(tiny_yaml):
    config = load_config([tiny_yaml], ["stage=recover", "run_folder=my runs/a"])
    line = training_command(config, 2)
    assert line.startswith("composer -n 2 -m bge_pruning.train ")
    record, override = shlex.split(line)[-2:]
    assert record == "my runs/a-recovery/config.yaml"
    again = load_config([tiny_yaml], ["stage=recover", override])
    assert again.run_folder == "my runs/a-again-recovery"


def test_a_run_that_resumes_replaces_its_report(run, train_tiny):
    again = train_tiny(run.parents[1], "autoresume=true", "max_duration=5ba", report=True)
    assert again == run
    assert "After 5 steps" in (run / "report.md").read_text(encoding="utf-8")


def test_a_run_without_gates(tmp_path, train_tiny):
    run = train_tiny(tmp_path, "max_duration=1ba", "model.l0_module=null", report=True)
    assert "gates.npz" not in names(run) and "report.html" in names(run)
    assert "of training without gates" in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_a_report_that_fails_does_not_fail_the_run(tmp_path, train_tiny, monkeypatch, caplog):
    def fail(*_):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(run_report, "save_gates", fail)
    with caplog.at_level(logging.WARNING, "bge_pruning"):
        run = train_tiny(tmp_path, "max_duration=1ba")
    assert {"ba1-rank0.pt", "metrics.jsonl"} <= names(run)
    message = (
        r"the report of the training failed, .*: ImportError: No module named 'matplotlib'\. To "
        rf"fix, run scripts/write_report\.py {re.escape(str(run))} --overwrite\."
    )
    assert [m for m in caplog.messages if re.fullmatch(message, m)]


def media(folder: Path) -> set[str]:
    """Pictures and pages of the only run below a folder, by their keys."""
    (run,) = (folder / "wandb").glob("offline-run-*")
    files = [path.relative_to(run / "files" / "media") for path in run.rglob("media/*/**/*.*")]
    return {"/".join(path.with_suffix("").parts[1:]).rsplit("_", 2)[0] for path in files}


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_works_offline_and_has_the_report(tmp_path, train_tiny):
    run = train_tiny(tmp_path, "max_duration=3ba", "loggers.wandb={}", report=True)
    wandb.finish()
    folder = tmp_path / "logs" / "tiny"
    assert media(folder) == {*SENT, "gates"}  # and one at each evaluation
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    words = [b"bge_pruning", b"tiny", b"loss/train/total", b"pruning/lambda_1/hidden"]
    words += [b"report/page", b"report/gates"]
    for _ in range(200):  # W&B's own process writes the record, and may be behind
        if all(word in record.read_bytes() for word in words):
            break
        time.sleep(0.1)
    assert [word for word in words if word not in record.read_bytes()] == []
    assert len(logged(run, "loss/train/total")) == 3


@pytest.mark.usefixtures("wandb_offline")
def test_results_are_a_run_of_their_own(run, tmp_path, tiny_yaml, monkeypatch):
    config = load_config([tiny_yaml], ["loggers.wandb={project: mine}"])
    shutil.copytree(run, config.results_folder)
    calls = []
    monkeypatch.setattr(run_report, "log_scores", lambda run, found: calls.append((run, found)))
    log_results(config, EvaluationRecord(tasks=[]))
    ((opened, evaluation),) = calls
    assert (opened.name, opened.project) == ("tiny-results", "mine")
    assert evaluation.as_dict() == {"tasks": []}
    assert media(tmp_path / "logs" / "tiny") == SENT


def test_without_a_configuration_wandb_is_not_imported(tiny_yaml, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would raise
    log_results(load_config([tiny_yaml]), EvaluationRecord(tasks=[]))
