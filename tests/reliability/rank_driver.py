"""One rank of a run that something happens to: ``rank_driver.py FAULT CONFIG [key=value ...]``.

FAULT is ``KIND:RANK``; ``none`` for a run that nothing happens to. With ``RANK_TRACE`` every rank
writes a hash of its gates at every step into a file of that name and its number.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import bge_pruning.training.data_builders as data
import bge_pruning.training.run_report as run_report
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.train import main

RANK = int(os.environ["RANK"])
MESSAGE = "the disk of this rank is on fire"


def happen(kind: str) -> None:
    if kind == "raises":
        raise ValueError(MESSAGE)
    if kind == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep({"is slow": 8, "hangs": 1000}[kind])


def wrap(where: object, name: str, kind: str, at: int) -> None:
    """Let it happen when a function is called for the ``at``-th time."""
    original, calls = getattr(where, name), []

    def function(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == at:
            happen(kind)
        return original(*args, **kwargs)

    setattr(where, name, function)


def trace(path: str) -> None:
    original = L0Module.sample_masks

    def sample_masks(module: L0Module) -> object:
        masks = original(module)
        tensors = [t for t in vars(masks).values() if t is not None] + list(module.parameters())
        content = b"".join(t.detach().numpy().tobytes() for t in tensors)
        with Path(f"{path}{RANK}").open("a") as file:
            file.write(f"{module.step} {hashlib.sha256(content).hexdigest()}\n")
        return masks

    L0Module.sample_masks = sample_masks


PLACES = {
    "in a step": (L0Module, "sample_masks", 2),
    "in step 4": (L0Module, "sample_masks", 4),
    "reading data": (data, "build_source", 1),
    "making a cache": (data, "cached_teacher_outputs", 1),
}

if __name__ == "__main__":
    run_report.write_report = lambda *_, **__: None  # takes longer than the run
    fault, *arguments = sys.argv[1:]
    if "RANK_TRACE" in os.environ:
        trace(os.environ["RANK_TRACE"])
    if fault != "none":
        kind, place, rank = fault.split(":")
        if int(rank) == RANK:
            where, name, at = PLACES[place]
            wrap(where, name, kind, at)
    sys.exit(main(arguments))
