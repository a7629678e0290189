"""Which torch device is used, and whether it is there."""

from __future__ import annotations

import warnings

import torch


def default_device() -> str:
    """The best device that there is."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device that cannot be used here.

    Args:
        device: Torch device.

    Raises:
        ValueError: If it cannot; the message says why.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts it
        reason = str(error).strip().partition("\n")[0]
        if "device type at start" in reason or "Invalid device string" in reason:
            reason = "torch knows no such device"
        raise ValueError(
            f"device {device} cannot be used here ({reason}). To fix, use cpu, or a device that "
            f"torch sees."
        ) from error


def compile_failure(device: str) -> str | None:
    """Why ``torch.compile`` does not work for a device: it needs Triton, or a compiler of C++.

    Args:
        device: Torch device.

    Returns:
        The first line of the error; ``None`` if it works.
    """
    try:
        with warnings.catch_warnings():
            # It advises less precise products of float32 numbers, once.
            warnings.filterwarnings("ignore", message="TensorFloat32", category=UserWarning)
            torch.compile(lambda x: x.cos() + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # the compiler has many of its own
        return str(error).strip().partition("\n")[0]
    return None
