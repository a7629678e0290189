"""Extractions that are killed at any moment: the output folder is absent, the old one or complete.

One process imports everything and then starts the others from itself, so that each takes a moment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bge_pruning.export.folder_check import check_folder
from bge_pruning.export.pruning_record import MARKER
from bge_pruning.model_io.pretrained import load_base_model

pytestmark = pytest.mark.reliability

ROOT = Path(__file__).parents[2]
MOMENTS = 8  # per kind of output: there before, or not
STEPS = 8  # the same, at what is done to files

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

DRIVER = """
import json, os, shutil, signal, sys, time
from pathlib import Path

import sentence_transformers.sentence_transformer.model
import transformers.models.xlm_roberta.modeling_xlm_roberta
import transformers.models.xlm_roberta.tokenization_xlm_roberta

from bge_pruning.export.extract import ExtractOptions, extract
from bge_pruning.model_io.model_folder import DTYPES

checkpoint, place, moments, steps = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def start(output, dtype="fp32", last=None, report=None):
    # A process that extracts; it kills itself at a step, or says how many there were.
    if process := os.fork():
        return process
    code, done = 1, 0

    def count(event, arguments):
        nonlocal done
        if event in EVENTS and str(output.parent) in str(arguments[0]):
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        extract(checkpoint, output, overwrite=True, options=ExtractOptions(dtype=DTYPES[dtype]))
        if report:
            report.write_text(str(done))
        code = 0
    finally:
        os._exit(code)


def finish(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def state(output):
    if not output.exists():
        return "absent"
    found = tree(output)
    return next((name for name, content in known.items() if content == found), "broken")


for dtype, name in (("bf16", "old"), ("fp32", "new"), ("fp32", "new")):
    started = time.perf_counter()
    assert finish(start(place / name / "model", dtype, report=place / "steps")) == 0
    seconds = time.perf_counter() - started
known = {name: tree(place / name / "model") for name in ("old", "new")}
total = int((place / "steps").read_text())

for exists in (False, True):
    output = place / f"exists-{exists}" / "model"
    kills = [("moment", (i + 0.5) / moments) for i in range(moments)]
    kills += [("step", (i + 0.5) / steps) for i in range(steps)]
    for kind, share in kills:
        if exists and state(output) != "old":
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(place / "old" / "model", output)
        if not exists:
            shutil.rmtree(output, ignore_errors=True)
        process = start(output, last=1 + int(share * total) if kind == "step" else None)
        if kind == "moment":
            time.sleep(share * seconds)
            os.kill(process, signal.SIGKILL)
        code = finish(process)
        row = {"exists": exists, "kind": kind, "share": share, "code": code}
        row["beside"] = len(os.listdir(output.parent)) - output.exists()
        row["state"] = state(output)
        print(json.dumps(row), flush=True)
    code = finish(start(output))
    print(json.dumps({"exists": exists, "kind": "last", "code": code, "state": state(output)}))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory, write_run, run_metadata) -> tuple[Path, list[dict]]:
    """The folder that was worked in, and what was found after each kill."""
    place = tmp_path_factory.mktemp("killed")
    checkpoint = write_run(place / "run", run_metadata) / "latest-rank0.pt"
    names = [str(checkpoint), str(place), str(MOMENTS), str(STEPS)]
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return place, [json.loads(line) for line in process.stdout.splitlines()]


def test_processes_were_killed_at_every_stage(rows):
    kills = [row for row in rows[1] if row["kind"] != "last"]
    assert len(kills) == 2 * (MOMENTS + STEPS)
    assert {row["code"] for row in kills} <= {0, -9}
    # A moment near the end may come too late.
    assert sum(row["code"] == -9 for row in kills) >= 2 * (MOMENTS + STEPS) - 8
    assert all(row["code"] == -9 for row in kills if row["kind"] == "step")
    assert any(row["beside"] for row in kills), "no kill left anything behind"


def test_the_folder_is_absent_or_complete_and_an_older_one_intact_or_replaced(rows):
    for row in rows[1]:
        assert row["state"] in ("old" if row["exists"] else "absent", "new"), row


def test_the_next_extraction_succeeds_and_cleans_up(rows):
    place, found = rows
    assert [row["state"] for row in found if row["kind"] == "last"] == ["new", "new"]
    for exists in (False, True):
        folder = place / f"exists-{exists}"
        assert os.listdir(folder) == ["model"]
        record = json.loads((folder / "model" / MARKER).read_text())
        assert record["shape"]["num_hidden_layers"] == 2
        check_folder(folder / "model", load_base_model(str(folder / "model")).shape)
