"""What a measurement ran on, and how much memory is free there."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

CPU_INFO, MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")


def processor_name(device: str) -> str:
    """Name of the GPU or CPU; never that of the host.

    Args:
        device: Torch device.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def free_bytes(device: str) -> int:
    """Bytes that can be taken on a device, as the system says; a container may be given less.

    Args:
        device: Torch device.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    rows = (line.split() for line in MEMORY_INFO.read_text().splitlines())
    return next(1024 * int(row[1]) for row in rows if row[0] == "MemAvailable:")
