"""The files of a run folder that a later run reads: checkpoints, and the gates as arrays.

A run can be killed while it writes a checkpoint, or while it moves the link to the newest one; a
disk can fill up or fail. The run then resumes from the newest complete file.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from bge_pruning.model_io.checkpoint import find_checkpoint, load_state, load_trained_model
from bge_pruning.model_io.sharded_checkpoint import check_whole_folder
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.utils.files import atomic_file

log = logging.getLogger(__name__)
# What the trainer calls its checkpoints, and its link to the newest one.
CHECKPOINT = "ba{batch}-rank{rank}.pt"
LATEST = "latest-rank0.pt"
# The trainer's own name for the folder that the ranks of a sharded run write is the second one.
NAME = re.compile(r"(?:ba(\d+)-rank0\.pt|ep\d+-ba(\d+))")
ASIDE = ".damaged"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a run, newest first, without the best one."""
    found = {path: NAME.fullmatch(path.name) for path in folder.glob("*ba*")}
    steps = {path: int(match[1] or match[2]) for path, match in found.items() if match}
    return sorted(steps, key=steps.get, reverse=True)


def check_whole(path: Path) -> None:
    """Read all of a checkpoint and compare it with its checksums.

    Raises:
        ValueError: If it is damaged or not complete; the message says how.
    """
    if path.is_dir():
        check_whole_folder(path)
        return
    load_state(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged ({error}).") from error
    if broken is not None:
        raise ValueError(f"{path}: damaged: the checksum of {broken} is wrong.")


def find_whole_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint, and point the run's link to it.

    Damaged ones are renamed, so that neither this nor the trainer meets them again.

    Returns:
        ``None`` if the run has completed no checkpoint yet.

    Raises:
        ValueError: If all checkpoints are damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in checkpoints:
        try:
            check_whole(path)
        except ValueError as error:
            path.rename(path.with_name(path.name + ASIDE))
            log.warning("%s It is renamed to %s%s.", error, path.name, ASIDE)
            continue
        if path is not checkpoints[0]:
            log.warning("going on from %s, the newest checkpoint that is whole", path)
        _link(folder / LATEST, path)
        return path
    if checkpoints and not (folder / LATEST).is_symlink():
        # The link is made when a checkpoint is complete: none ever was.
        log.warning("%s: killed while it wrote its first checkpoint: starting again", folder)
    elif checkpoints:
        raise ValueError(
            f"{folder}: all its {len(checkpoints)} checkpoints are damaged, so the run cannot go "
            f"on. To fix, restore one of them, or start again with overwrite=true."
        )
    # A link to a file that is not there would be followed.
    (folder / LATEST).unlink(missing_ok=True)
    return None


def _link(link: Path, target: Path) -> None:
    """Point a link to a file beside it; at no moment is it missing or broken."""
    if link.is_symlink() and os.readlink(link) == target.name:
        return
    with atomic_file(link) as partial:
        partial.symlink_to(target.name)


def write_gates(run_or_checkpoint: Path, path: Path) -> None:
    """Write the gates of a run as arrays, for pictures.

    Args:
        path: ``.npz`` file: open probabilities under the axis names, and boolean ``<axis>_kept``.
    """
    model = load_trained_model(find_checkpoint(run_or_checkpoint))
    if model.l0_module is None:
        raise ValueError(f"{run_or_checkpoint}: is a run without gates. To fix, name another run.")
    save_gates(model.l0_module, path)


def save_gates(l0_module: L0Module, path: Path) -> None:
    """Write gates as arrays, atomically."""
    with atomic_file(path) as partial:
        np.savez_compressed(partial, **gate_arrays(l0_module))


@torch.no_grad()
def gate_arrays(l0_module: L0Module) -> dict[str, np.ndarray]:
    """Open probabilities under the axis names, and as ``<axis>_kept`` what a cut would keep now."""
    probabilities = l0_module.open_probabilities()
    masks = l0_module.deterministic_masks()
    arrays = {axis: values.cpu().numpy() for axis, values in probabilities.items()}
    kept = {axis: getattr(masks, axis).bool().cpu().numpy() for axis in probabilities}
    return arrays | {f"{axis}_kept": mask for axis, mask in kept.items()}
