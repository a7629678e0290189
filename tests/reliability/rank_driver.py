"""One rank of a run that something happens to: ``rank_driver.py FAULT CONFIG [key=value ...]``.

FAULT is ``KIND:PLACE:RANK``, or several with commas between them; ``none`` for a run that nothing
happens to. With ``--sts`` among the arguments the run is a pipeline. With ``RANK_TRACE`` every rank
writes hashes of its gates and of its table of words at every step into a file of that name and its
number.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

import bge_pruning.training.data_builders as data
from bge_pruning.algorithms.row_updates import AdamW
from bge_pruning.export import extract
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.train import main as train
from bge_pruning.training import builders, run_report, stage, teacher_cache
from bge_pruning.workflows import pipeline, stages
from bge_pruning.workflows.training_commands import pipeline as run_pipeline

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
        if len(calls) == at and kind != "differs":
            happen(kind)
        result = original(*args, **kwargs)
        if kind == "differs":
            with torch.no_grad():
                for parameter in result.parameters():
                    parameter.add_(0.01)
        return result

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
    update_rows = AdamW._update_rows

    def update(optimizer: AdamW, group: dict, table: torch.nn.Parameter) -> None:
        step = int(optimizer.state[table].get("step", 0))
        content = b"".join(t.detach().numpy().tobytes() for t in (table, table.grad.to_dense()))
        with Path(f"{path}{RANK}").open("a") as file:
            file.write(f"{step} {hashlib.sha256(content).hexdigest()}\n")
        update_rows(optimizer, group, table)

    AdamW._update_rows = update


PLACES = {
    "in a step": (L0Module, "sample_masks", 2),
    "in step 4": (L0Module, "sample_masks", 4),
    "reading data": (data, "build_source", 1),
    "making a cache": (teacher_cache, "fill_caches", 1),
    "calibrating": (stage, "order_gates", 1),
    "building": (builders, "build_model", 1),
    "recording": (stage, "record_start", 1),
    "reporting": (stage, "report", 1),
    "extracting": (extract, "extract", 1),
    "choosing": (stages, "cut_baseline", 1),
    "evaluating": (pipeline, "evaluate_model", 1),
}

if __name__ == "__main__":
    run_report.write_report = lambda *_, **__: None  # takes longer than the run
    fault, *arguments = sys.argv[1:]
    if "RANK_TRACE" in os.environ:
        trace(os.environ["RANK_TRACE"])
    for each in fault.split(",") if fault != "none" else []:
        kind, place, rank = each.split(":")
        if int(rank) == RANK:
            where, name, at = PLACES[place]
            wrap(where, name, kind, at)
    sys.exit((run_pipeline if "--sts" in arguments else train)(arguments))
