"""Describe what a number was measured with: the device, the machine, and library versions."""

from __future__ import annotations

import os
import platform
import time
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

CPU = Path("/proc/cpuinfo")
LIBRARIES = tuple(
    "torch transformers sentence-transformers mteb tokenizers safetensors numpy scipy".split()
)
# Compiled forms of one function that torch keeps. Its own limit is 8, and beyond it torch would run
# the function as it is: training, evaluation, precisions and sizes are more.
COMPILED_FORMS = 64
# Cores that a system needs for itself.
CROWDED = 0.25


def default_device() -> str:
    """The best available device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_device(device: str | None) -> str:
    """The torch device of ``cpu`` or ``gpu``, Composer's names; the best one for ``None``."""
    return {"gpu": "cuda"}.get(device, device) or default_device()


def check_device(device: str) -> None:
    """Refuse a torch device that cannot be used here; the ``ValueError`` says why."""
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
    """The first line of the error of ``torch.compile``, which needs a compiler; or ``None``."""
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


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a score depends on, if they are installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # a benchmark needs only some of them
            versions[name] = version(name)
    return versions


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Names of the CPU and the GPU (``None`` if the device is not one), and cores of the system."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu}


class OtherWork:
    """Measures how many cores other programs keep busy while it is open, a context manager."""

    cores = 0.0

    def __enter__(self) -> OtherWork:
        self._before = _clocks()
        return self

    def __exit__(self, *error: object) -> None:
        wall, busy, own = (now - then for now, then in zip(_clocks(), self._before, strict=True))
        self.cores = max(0.0, busy - own) / max(wall, 1e-9)


def _clocks() -> tuple[float, float, float]:
    """Seconds on the wall, of work on all cores, and of this process and its children."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(times, kind, 0.0) for kind in kinds)
    return time.monotonic(), busy, sum(os.times()[:4])


def load_note(threads: int | None, other_cores: float | None) -> str:
    """What to say of times that were measured while more threads wanted a core than there are."""
    cores = os.cpu_count() or 1
    if other_cores is None or other_cores + (threads or 1) <= cores + CROWDED:
        return ""
    return (
        f"other programs kept {other_cores:.1f} of {cores} cores busy, so that times are too long"
    )


def _cpu_name() -> str:
    lines = CPU.read_text(encoding="utf-8").splitlines() if CPU.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
