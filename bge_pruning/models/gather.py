"""Tensors of all ranks, with gradient to the rank that each row came from."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


class _Gather(torch.autograd.Function):
    """``torch.distributed.nn.functional.all_gather`` sends gradients as they lie in memory.

    Those of a matrix product are transposed there, and would arrive mixed up on other ranks.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Rows of all ranks, one rank after the other."""
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """The sum over the ranks of the gradient of this rank's rows."""
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        size = len(total) // torch.distributed.get_world_size()
        return total.narrow(0, torch.distributed.get_rank() * size, size)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, one rank after the other.

    Args:
        rows: Shape ``(B, ...)``, the same on every rank.

    Returns:
        Shape ``(W * B, ...)`` for ``W`` ranks; ``rows`` itself on a single one. The gradient of
        each row is the sum of what all ranks make of it.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return rows
    return _Gather.apply(rows.contiguous())
