"""Tensors of all ranks, with gradient to the rank that each row came from."""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bge_pruning.models.embedding_heads import Outputs


def world_size() -> int:
    """Number of ranks."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def global_rank() -> int:
    """Number of this rank."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Replaces ``torch.distributed.nn.functional.all_gather``.

    That one sends gradients in their memory order; those of a matrix product are transposed in
    memory and would arrive permuted on other ranks. Nothing is in memory twice: the multi-vectors
    of all ranks' passages take gigabytes.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Rows of all ranks, one rank after the other."""
        every = rows.new_empty(torch.distributed.get_world_size() * len(rows), *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(every, rows)
        return every

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        """Sum the gradient of this rank's rows over the ranks."""
        size = len(gradient) // torch.distributed.get_world_size()
        own = gradient.new_empty(size, *gradient.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, gradient.contiguous())
        return own


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all ranks, one rank after the other, ``(W * B, ...)`` for ``W`` ranks.

    ``rows``, ``(B, ...)``, have the same shape on every rank, and are returned themselves on a
    single one. The gradient of each row is the sum of its gradients on all ranks.
    """
    if world_size() == 1:
        return rows
    return _Gather.apply(rows.contiguous())


def gather_texts(texts: Outputs, numbers: Tensor) -> tuple[Outputs, Tensor]:
    """Gather texts and their numbers ``(B,)`` of all ranks, padded to the longest text."""
    if world_size() == 1:
        return texts, numbers
    longest = torch.full((), texts.input_ids.shape[1], device=numbers.device)
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    missing = int(longest) - texts.input_ids.shape[1]

    def gather(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        # (B, T, ...): zeros behind the last token
        return gather_rows(F.pad(value, [0, 0] * (value.ndim - 2) + [0, missing]))

    gathered = Outputs(
        gather(texts.input_ids),
        gather(texts.attention_mask),
        gather_rows(texts.dense_vecs),
        gather(texts.token_weights),
        gather(texts.colbert_vecs),
    )
    return gathered, gather_rows(numbers)


def gather_batch(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the vectors of all ranks, with gradient to the rank that each text came from.

    Args:
        student: This rank's vectors, shape ``(B, Hs)``.
        teacher: This rank's target vectors, shape ``(B, Ht)``.

    Returns:
        All student and target vectors, and the column of each of this rank's texts, ``(B,)``.
    """
    own = torch.arange(student.shape[0], device=student.device)
    own = own + global_rank() * student.shape[0]
    return gather_rows(student), gather_rows(teacher), own
