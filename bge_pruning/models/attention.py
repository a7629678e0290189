"""Attention of packed texts, each of which attends to its own tokens alone.

Three ways to the same numbers. Texts of equal length are a view of packed tokens, ``(texts, length,
...)``: one call of torch's scaled dot-product attention for each length, without copies, masks or
padding. Where there is a kernel for texts of any lengths (16-bit numbers on a GPU, torch 2.10 or
newer), one call for all of them. Where padding is computed too, one call with a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bge_pruning.models.packing import Packing

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


def varlen_applies(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel for texts of any lengths can be used.

    Args:
        device: Where the model runs.
        dtype: Of its weights; under autocast its numbers have that of autocast.
        head_dim: Size of a head.
    """
    if varlen_attn is None or device.type != "cuda" or head_dim % 8 or head_dim > 256:
        return False
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return dtype in (torch.float16, torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout_p: float) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: Shape ``(N, A, D)``.
        key: Same.
        value: Same.
        packing: Where the texts are.
        dropout_p: Probability of dropping an attention weight; 0 if ``packing`` has boundaries.

    Returns:
        Shape ``(N, A, D)``.
    """
    if not query.shape[1]:
        return query  # no head is left; torch 2.11 would divide by their number
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _attend_in_float32(query, key, value, packing, dropout_p)
    if packing.boundaries is not None:
        ends, longest = packing.boundaries, packing.size[1]
        return varlen_attn(query, key, value, ends, ends, longest, longest)
    if packing.index is None:
        mask = None
        if packing.real is not None:
            # A text without tokens attends to its padding: a softmax over nothing is no number.
            open_keys = packing.real | ~packing.real.any(1, keepdim=True)
            mask = open_keys[:, None, None]
        return _attend(packing.size, query, key, value, dropout_p, mask)
    # One split of each, whose gradient is one concatenation; slices would each be padded back.
    parts = [x.split(packing.group_tokens) for x in (query, key, value)]
    groups = zip(packing.groups, *parts, strict=True)
    return torch.cat([_attend(*group, dropout_p) for group in groups])


def _attend_in_float32(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout_p: float
) -> Tensor:
    """On a CPU torch 2.7 is slower in bfloat16, in the backward pass by a multiple."""
    with torch.autocast("cpu", enabled=False):
        context = attend(query.float(), key.float(), value.float(), packing, dropout_p)
    return context.to(query.dtype)


def _attend(
    size: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of texts of one length, shape ``(texts * length, A, D)``."""
    parts = [x.unflatten(0, size).transpose(1, 2) for x in (query, key, value)]
    context = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout_p)
    return context.transpose(1, 2).flatten(0, 1)
