"""The gates of a run as arrays, for pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from bge_pruning.model_io.checkpoint import find_checkpoint, load_trained_model
from bge_pruning.models.l0_module_embedding import L0Module


def write_gates(run_or_checkpoint: Path, path: Path) -> None:
    """Write the gates of a run as arrays, for pictures.

    Args:
        run_or_checkpoint: Run folder or checkpoint.
        path: ``.npz`` file: open probabilities under the axis names, and boolean ``<axis>_kept``.

    Raises:
        ValueError: If the run has no gates.
    """
    model = load_trained_model(find_checkpoint(run_or_checkpoint))
    if model.l0_module is None:
        raise ValueError(f"{run_or_checkpoint}: is a run without gates. To fix, name another run.")
    save_gates(model.l0_module, path)


def save_gates(l0_module: L0Module, path: Path) -> None:
    """Write gates as arrays, atomically.

    Args:
        l0_module: The gates.
        path: ``.npz`` file, see :func:`write_gates`.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        np.savez_compressed(temporary, **gate_arrays(l0_module))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def gate_arrays(l0_module: L0Module) -> dict[str, np.ndarray]:
    """Open probabilities under the axis names, and as ``<axis>_kept`` what a cut would keep now."""
    probabilities = l0_module.open_probabilities()
    masks = l0_module.deterministic_masks()
    arrays = {axis: values.cpu().numpy() for axis, values in probabilities.items()}
    kept = {axis: getattr(masks, axis).bool().cpu().numpy() for axis in probabilities}
    return arrays | {f"{axis}_kept": mask for axis, mask in kept.items()}
