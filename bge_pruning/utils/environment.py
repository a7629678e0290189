"""Describe what a number was measured with: versions of the libraries, and the machine."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPU = Path("/proc/cpuinfo")
LIBRARIES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "mteb",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
)


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a score depends on, if they are installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # a benchmark needs only some of them
            versions[name] = version(name)
    return versions


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Describe the machine that a speed was measured on.

    Args:
        device: Torch device.

    Returns:
        ``cpu`` (its name), ``cores`` (of the system) and ``gpu`` (its name, ``None`` if the device
        is not a GPU).
    """
    import torch

    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu}


def _cpu_name() -> str:
    lines = CPU.read_text(encoding="utf-8").splitlines() if CPU.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
