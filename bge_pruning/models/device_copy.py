"""Small tensors that the host makes, on the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on a device.

    From ordinary memory a copy to a GPU waits for all that was launched before.

    Args:
        values: On the CPU.
        device: Where to.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
