"""Runs that are killed and go on, each started from one process that has imported everything.

Called by ``test_kills.py`` with a JSON file: the runs' command line, where to work, and what kills
them. Writes a JSON line for every run into a file.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import composer  # noqa: F401  (imported here so that the children need not)

import bge_pruning.training.builders
import bge_pruning.training.data_builders
import bge_pruning.training.run_report
from bge_pruning.train import main

EVENTS = ("open", "os.rename", "os.remove", "os.symlink", "os.mkdir")


def start(arguments: list[str], folder: Path, last: int | None, count_to: Path | None) -> int:
    """A process that trains; it kills itself at the ``last`` thing it does to the run folder."""
    if process := os.fork():
        return process
    code, done = 1, 0

    def count(event: str, values: tuple) -> None:
        nonlocal done
        if event in EVENTS and str(folder) in f"{values[0]}{values[1] if values[1:] else ''}":
            done += 1
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        log = os.open(f"{folder}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # The report takes longer than the run.
        bge_pruning.training.run_report.write_report = lambda *_, **__: None
        code = main(arguments)
        if count_to is not None:
            count_to.write_text(str(done))
    except SystemExit as error:  # before the first step, the trainer's own answer to SIGTERM
        code = error.code
    finally:
        os._exit(code)


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_killed(job: dict, name: str, kill: dict, seconds: float, total: int) -> dict:
    """One run: killed, then gone on to its end."""
    arguments = [*job["arguments"], f"run_name={name}", "autoresume=true"]
    folder = Path(job["runs"]) / name
    last = 1 + int(kill["share"] * total) if kill["kind"] == "event" else None
    process = start(arguments, folder, last, None)
    if kill["kind"] == "moment":
        time.sleep(kill["share"] * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    if kill["kind"] == "terminate":
        time.sleep(kill["share"] * seconds)
        os.kill(process, signal.SIGTERM)
    code = finish(process)
    left = sorted(path.name for path in folder.glob("*.pt")) if folder.is_dir() else []
    again = finish(start(arguments, folder, None, None))
    return {**kill, "name": name, "code": code, "checkpoints": left, "again": again}


def work(job: dict) -> None:
    count = Path(job["runs"]) / "events"
    for _ in range(2):  # the first one also fills the cache of the teacher
        folder = Path(job["runs"]) / "whole"
        begun = time.perf_counter()
        arguments = [*job["arguments"], "run_name=whole", "overwrite=true"]
        assert finish(start(arguments, folder, None, count)) == 0, Path(f"{folder}.log").read_text()
        seconds = time.perf_counter() - begun
    total = int(count.read_text())
    for number, kill in enumerate(job["kills"]):
        row = run_killed(job, f"killed-{number}", kill, seconds, total)
        with Path(job["report"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, "seconds": seconds, "events": total}) + "\n")


if __name__ == "__main__":
    work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
