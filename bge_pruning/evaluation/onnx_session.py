"""Running an ONNX file with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bge_pruning.utils.optional import import_optional

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INPUTS = ("input_ids", "attention_mask")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(path: Path, device: str = "cpu") -> InferenceSession:
    """A session with as many threads as torch has, so that their speeds can be compared.

    Args:
        path: ONNX file.
        device: ``cpu``, ``cuda`` or ``cuda:INDEX``.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If it has no support for the device, or the file is damaged.
    """
    runtime = import_optional("onnxruntime", "onnx")
    provider = find_provider(device, str(path))
    kind, _, index = device.partition(":")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait by spinning would slow the other model of a comparison, or torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors alone
    settings = {"device_id": int(index or 0)} if kind == "cuda" else {}
    try:
        return runtime.InferenceSession(str(path), options, providers=[(provider, settings)])
    except Exception as error:  # the library has a class for every code of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path}: cannot be loaded ({reason}). To fix, export the model again."
        ) from error


def find_provider(device: str, name: str) -> str:
    """What runs a graph on a device.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:INDEX``.
        name: What is to run, for the message.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If it has no support for the device.
    """
    provider = PROVIDERS.get(device.partition(":")[0])
    if provider not in import_optional("onnxruntime", "onnx").get_available_providers():
        raise ValueError(
            f"{name}: the installed ONNX Runtime cannot run on {device}. To fix, pass --device "
            f"cpu, or pip install onnxruntime-gpu in place of onnxruntime."
        )
    return provider


def run_session(
    session: InferenceSession, ids: Tensor, mask: Tensor, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Outputs by name.

    Args:
        session: See :func:`open_session`.
        ids: Token ids, int64, shape ``(B, T)``.
        mask: Same shape; 0 for padding.
        names: Outputs to compute.
    """
    inputs = {name: t.cpu().numpy() for name, t in zip(INPUTS, (ids, mask), strict=True)}
    return dict(zip(names, session.run(list(names), inputs), strict=True))
