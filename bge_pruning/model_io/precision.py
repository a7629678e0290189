"""Precision of the weights on disk: rounding them, and what that changes.

Rounding to nearest changes a weight by its unit roundoff at most, relative to itself: 2^-11 (0.05
%) in float16 and 2^-8 (0.4 %) in bfloat16. float16 loses more below 2^-14 (its steps are 2^-24
there) and ends at 65504; bfloat16 has float32's range. How far that moves an output depends on the
model, so it is measured, not bounded. What can be exact is: a model that was rounded in memory and
one that was written and read back have the same float32 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads

# Precisions by their names on the command line.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 1 << 22  # numbers that are worked on at a time


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``, as ``config.json`` has it."""
    return str(dtype).removeprefix("torch.")


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a precision that no model is written in."""
    if dtype not in DTYPES.values():
        raise ValueError(
            f"dtype {dtype} is not one of {', '.join(map(str, DTYPES.values()))}. To fix, choose "
            f"one: {', '.join(DTYPES)}."
        )


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of the pieces of a contiguous tensor: working on them takes little memory."""
    yield from tensor.detach().view(-1).split(BLOCK)


def round_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a tensor to a precision; a tensor that has it is returned as it is."""
    check_dtype(dtype)
    if tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    # A sum is one quick pass, and hardly ever anything but finite.
    if rounded.sum(dtype=torch.float32).isfinite():
        return rounded
    if bool((rounded.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max()
        raise ValueError(
            f"{name} holds {largest:g}, and {dtype_name(dtype)} ends at "
            f"{torch.finfo(dtype).max:g}. To fix, write the model in bf16 or fp32."
        )
    return rounded


@torch.no_grad()
def round_weights(backbone: XLMRobertaBackbone, heads: EmbeddingHeads, dtype: torch.dtype) -> None:
    """Round all weights in place; they stay float32 tensors.

    Rounding weight by weight and cutting rows and columns can be done in either order.
    """
    for module in (backbone, heads):
        for name, parameter in module.named_parameters():
            for block in blocks(parameter):
                block.copy_(round_tensor(name, block, dtype))


def precision_loss(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """How far rounding moved the float32 outputs.

    Returns ``dense_cosine``, the lowest cosine of a text's two dense vectors; and the largest
    difference of every output under its name.
    """
    cosine = torch.cosine_similarity(before["dense_vecs"], after["dense_vecs"], dim=-1)
    differences = {name: float((after[name] - before[name]).abs().max()) for name in before}
    return {"dense_cosine": float(cosine.min()), **differences}
