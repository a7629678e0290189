"""Choose torch devices, and check that they are available."""

from __future__ import annotations

import warnings

import torch

# Compiled forms of one function that torch keeps. Its own limit is 8, and beyond it torch would run
# the function as it is: training, evaluation, precisions and sizes are more.
COMPILED_FORMS = 64


def default_device() -> str:
    """The best available device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_device(device: str | None) -> str:
    """The torch device of a configuration's ``device``, which is Composer's name for it.

    Args:
        device: ``cpu``, ``gpu``; ``None`` for the best available device.
    """
    return {"gpu": "cuda"}.get(device, device) or default_device()


def check_device(device: str) -> None:
    """Refuse a device that cannot be used here.

    Args:
        device: Torch device.

    Raises:
        ValueError: If it cannot be used; the message says why.
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
    """Check ``torch.compile`` on a device: it needs Triton, or a C++ compiler.

    Args:
        device: Torch device.

    Returns:
        The first line of the error; ``None`` if it works.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own parts
            torch.compile(lambda x: x.cos() + 1.0)(torch.ones(8, device=device))
    except Exception as error:  # the compiler has many of its own
        return str(error).strip().partition("\n")[0]
    return None


def allow_compiled_forms() -> None:
    """Let torch keep more compiled forms of a function than its default limit."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILED_FORMS)
