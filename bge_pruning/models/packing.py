"""Packs a batch without its padding, and computes attention over its texts.

Linear layers, LayerNorms and gates work on tokens one by one, so they run on the packed tokens.
Attention needs the tokens of a text together. There are three ways to the same numbers:

* Texts of equal length are a view of packed tokens, ``(texts, length, ...)``: one call of torch's
  scaled dot-product attention for each length, without copies, masks or padding.
* Where there is a kernel for texts of any lengths (16-bit numbers on a GPU, torch 2.10 or newer),
  one call serves all of them.
* Where padding is computed too, there is one call with a mask.

On a batch of one length all of this is a change of shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Places of the computed tokens in a padded batch.

    Attributes:
        size: ``(B, T)`` of the padded batch.
        index: Place of each packed token in the flattened batch, shape ``(N,)``; ``None`` if all
            tokens are computed, in their order.
        groups: Number of texts and tokens per text of each run of equal length, shortest first.
        boundaries: Start of each text and end of the last, shape ``(B + 1,)``, int32; ``None`` if
            texts attend group by group.
        real: True for tokens that are not padding, shape ``(B, T)``, if padding is computed too.
    """

    size: tuple[int, int]
    index: Tensor | None
    groups: tuple[tuple[int, int], ...]
    boundaries: Tensor | None = None
    real: Tensor | None = None

    @property
    def group_tokens(self) -> list[int]:
        """Tokens of each group."""
        return [texts * length for texts, length in self.groups]

    def pack(self, padded: Tensor) -> Tensor:
        """The tokens that are computed, ``(B, T, ...)`` to ``(N, ...)``."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """The padded batch, 0 where there is no token, ``(N, ...)`` to ``(B, T, ...)``."""
        if self.index is not None:
            rows = self.size[0] * self.size[1]
            empty = packed.new_zeros(rows, *packed.shape[1:])
            packed = empty.index_copy(0, self.index, packed)
        padded = packed.unflatten(0, self.size)
        if self.real is None:
            return padded
        return padded * self.real.view(*self.size, *[1] * (padded.ndim - 2)).to(padded.dtype)


def compute_packing(
    attention_mask: Tensor, lengths: Sequence[int] | None = None, varlen: bool = False
) -> Packing:
    """Find the real tokens of a batch; the mask ``(B, T)`` is 1 for them.

    Without ``lengths``, the real tokens of each text, the host waits for a GPU, because they decide
    what is launched. ``varlen`` prepares attention over texts of different lengths at once.
    """
    real = attention_mask.bool()
    size = (real.shape[0], real.shape[1])
    counts = real.sum(1)
    if lengths is None:
        lengths = counts.tolist()
    if all(length == size[1] for length in lengths):
        return Packing(size, None, (size,))
    # Sorting by the rank of their texts gives the places of the tokens; padding has the last rank.
    ranks = counts.argsort(stable=True).argsort()
    keys = torch.where(real, ranks[:, None], size[0]).flatten()
    index = keys.argsort(stable=True)[: sum(lengths)]
    texts = Counter(length for length in lengths if length > 0)
    groups = tuple((texts[length], length) for length in sorted(texts))
    boundaries = None
    if varlen:
        boundaries = F.pad(counts.sort().values.cumsum(0), (1, 0)).to(torch.int32)
    return Packing(size, index, groups or ((0, 1),), boundaries)  # only padding: no texts


def keep_padding(attention_mask: Tensor) -> Packing:
    """Compute padding too, so that every shape follows from that of the batch."""
    real = attention_mask.bool()
    size = (real.shape[0], real.shape[1])
    return Packing(size, None, (size,), real=real)


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


def varlen_applies(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel for texts of any lengths can be used; under autocast its type counts."""
    if varlen_attn is None or device.type != "cuda" or head_dim % 8 or head_dim > 256:
        return False
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return dtype in (torch.float16, torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout_p: float) -> Tensor:
    """Scaled dot-product attention of ``(N, A, D)``; no dropout if ``packing`` has boundaries."""
    if not query.shape[1]:
        return query  # no head is left; torch 2.11 would divide by their number, 0
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _attend_in_float32(query, key, value, packing, dropout_p)
    if packing.boundaries is not None:
        ends, longest = packing.boundaries, packing.size[1]
        return varlen_attn(query, key, value, ends, ends, longest, longest)
    if packing.index is None:
        mask = None
        if packing.real is not None:
            # A text without tokens attends to its padding: a softmax over nothing is NaN.
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
    """Attend in float32: on a CPU torch 2.7 is slower in bfloat16, backward by a multiple."""
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


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on a device of values on the CPU.

    A copy from pageable memory would wait for everything launched on the GPU before.
    """
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
