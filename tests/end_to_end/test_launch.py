"""Every way to start a run, in processes of its own."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from bge_pruning.model_io.checkpoint import read_best_score
from tests.common.trainings import logged, read_metrics

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
COMPOSER = str(Path(PYTHON).with_name("composer"))
LAUNCHERS = {
    "python -m": [PYTHON, "-m", "bge_pruning.train"],
    "script": [PYTHON, "scripts/train_pruning.py"],
    "composer": [COMPOSER, "-n", "1", "-m", "bge_pruning.train"],
}
# Runs when the interpreter of a launched process ends.
SITE = """\
import atexit, importlib.util, json, os, sys
def report():
    if "bge_pruning.config.load" in sys.modules:
        spec = importlib.util.find_spec("datasets")
        with open(os.environ["REPORT"], "w") as file:
            json.dump({"datasets": spec.origin, "path": sys.path}, file)
atexit.register(report)
"""


def run(command: Sequence[str], **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def plans(make_yaml, tmp_path_factory):
    """Exit code, output, errors and import paths of a dry run by launcher."""
    folder = tmp_path_factory.mktemp("launch")
    yaml = make_yaml(folder)
    (folder / "sitecustomize.py").write_text(SITE)
    answers = {}
    for name, launcher in LAUNCHERS.items():
        report = folder / f"{name}.json"
        code, out, err = run(
            [*launcher, str(yaml), "dry_run=true"],
            PYTHONPATH=f"{folder}{os.pathsep}{ROOT}",
            REPORT=str(report),
        )
        answers[name] = code, out, err, json.loads(report.read_text())
    return answers


@pytest.mark.parametrize("name", LAUNCHERS)
def test_dry_run_prints_the_same_plan(name, plans):
    code, out, err, _ = plans[name]
    assert code == 0, err
    assert "gates on     head, hidden, intermediate, layer" in out
    assert "steps        4 = 4ba (batch 8), evaluated every 2ba" in out
    # Composer's launcher adds a line about waiting for its processes.
    assert out.startswith(plans["python -m"][1].strip())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_datasets_is_hugging_faces(name, plans):
    report = plans[name][3]
    assert Path(report["datasets"]).parts[-3:] == ("site-packages", "datasets", "__init__.py")
    assert str(ROOT / "bge_pruning") not in [str(Path(p).resolve()) for p in report["path"]]


def test_misspelt_key_is_one_line_and_code_2(tiny_yaml):
    code, out, err = run([PYTHON, "-m", "bge_pruning.train", str(tiny_yaml), "optimizer.lrr=1"])
    assert (code, out, err.count("\n")) == (2, "", 2)  # the first one says that it begins
    assert err.endswith(
        "error: override 'optimizer.lrr=1': unknown key 'optimizer.lrr': did you mean 'lr'?\n"
    )


# Two processes. Other losses, four ranks, shards and faults: reliability/test_ranks.py.

# Two sources in pieces with every loss; an odd number of pairs and of passages, in every mode.
OVERRIDES = (
    "max_duration=3ba",
    "scheduler.t_warmup=0ba",
    "optimizer.eps=1e-3",  # several softmaxes at a low temperature round more
    "device_train_microbatch_size=3",
    "data.train=[{{name: p, kind: sts, path: {csv}}},"
    " {{name: q, kind: contrastive, path: {jsonl}, negatives: 1}}]",
    "loss={{sts_regression: 0.5, cosent: 0.1, distillation_alignment: 0.5,"
    " distillation_similarity: 0.5, distillation_sparse: 0.5, distillation_colbert: 0.5,"
    " contrastive: 1.0, self_distillation: 0.5, temperature: 0.1, learn_temperature: true}}",
    "data.eval=[{{name: dev, kind: sts, path: {odd}}},"
    " {{name: docs, kind: beir, path: {collection}, split: test}}]",
    "evaluation.modes=[dense, sparse, colbert, dense+sparse, all]",
    "evaluation.keep_best=docs/all_ndcg_at_10",
)


@pytest.fixture(scope="module")
def one_and_two(
    make_yaml, train_tiny, tmp_path_factory, contrastive_jsonl, sts_csv, collection
) -> tuple[Path, Path]:
    """The run folders of one process and of two."""
    one, two, odd = (tmp_path_factory.mktemp(name) for name in ("one", "two", "odd"))
    lines = sts_csv.read_text().splitlines(keepends=True)[:-1]
    (odd / "odd.csv").write_text("".join(lines))
    paths = {"csv": sts_csv, "jsonl": contrastive_jsonl, "collection": collection}
    overrides = [text.format(odd=odd / "odd.csv", **paths) for text in OVERRIDES]
    # The launcher finds a free port.
    launcher = [COMPOSER, "-n", "2", "-m", "bge_pruning.train"]
    code, out, err = run([*launcher, str(make_yaml(two)), *overrides])
    assert code == 0, out + err
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The warmup duration is 0", UserWarning)
        return train_tiny(one, *overrides), two / "runs" / "tiny"


def test_two_processes_equal_one(one_and_two, load_state, assert_same):
    one, two = one_and_two
    first, second = load_state(one), load_state(two)
    # DistributedDataParallel may prefix every name.
    names = {re.sub(r"^module\.", "", k): v for k, v in second["model"].items()}
    assert_same(first["model"], names, atol=1e-5)
    assert any(name.startswith("l0_module.log_alpha") for name in names)
    moved = "l0_module.log_alpha.hidden"
    start = load_state(one.parent / "tiny" / "ba2-rank0.pt")["model"][moved]
    assert (start - first["model"][moved]).abs().max() > 1e-3
    # A loss of 255 has steps of 1.5e-5 in float32.
    for key in ("loss/train/total", "loss/train/lagrangian", "pruning/lambda_1/hidden"):
        assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-7, abs=1e-5)


def test_two_processes_evaluate_as_one(one_and_two):
    rows = read_metrics(one_and_two[0])
    keys = {key for row in rows for key in row["metrics"] if key.startswith("eval/")}
    assert len(keys) == 1 + 5 * 4 + 1
    for key in keys - {"eval/seconds"}:
        found = [logged(folder, key) for folder in one_and_two]
        assert len(found[0]) == 2
        assert found[1] == pytest.approx(found[0], abs=1e-6), key
    best = [read_best_score(folder / "best-rank0.pt") for folder in one_and_two]
    assert best[0].batch == best[1].batch
    assert best[0].score == pytest.approx(best[1].score, abs=1e-6)
