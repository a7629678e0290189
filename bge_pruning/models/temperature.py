"""A softmax temperature that is learned and cannot leave its range."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOWEST, HIGHEST = 0.005, 1.0


class LearnedTemperature(nn.Module):
    """``exp(a + (b - a) sigmoid(raw))`` between the logarithms of :data:`LOWEST` and ``HIGHEST``.

    Args:
        start: Temperature at the start, inside the range.

    Raises:
        ValueError: If the start is not inside the range.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        if not LOWEST < start < HIGHEST:
            raise ValueError(
                f"a learned temperature cannot start at {start}, expected a number between "
                f"{LOWEST} and {HIGHEST}. To fix, set loss.temperature."
            )
        low, high = math.log(LOWEST), math.log(HIGHEST)
        share = (math.log(start) - low) / (high - low)
        self.raw = nn.Parameter(torch.tensor(math.log(share / (1.0 - share))))

    def forward(self) -> Tensor:
        """The temperature, a scalar."""
        low, high = math.log(LOWEST), math.log(HIGHEST)
        return torch.exp(low + (high - low) * torch.sigmoid(self.raw))
