"""A batch without its padding: real tokens one after the other, texts of equal length together.

Linear layers, LayerNorms and gates work on tokens one by one, so they run on the packed tokens.
Attention needs the tokens of a text together: texts of equal length are a view of packed tokens,
``(texts, length, ...)``, without copies, masks or padding. On a batch of one length all of this is
a change of shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch are.

    Attributes:
        size: ``(B, T)`` of the padded batch.
        index: Place of each packed token in the flattened batch, shape ``(N,)``; ``None`` if all
            tokens are real, which then stay in their order.
        groups: Texts and tokens a text, of each run of texts of equal length, shortest first.
    """

    size: tuple[int, int]
    index: Tensor | None
    groups: tuple[tuple[int, int], ...]

    @property
    def group_tokens(self) -> list[int]:
        """Tokens of each group."""
        return [texts * length for texts, length in self.groups]

    def pack(self, padded: Tensor) -> Tensor:
        """Real tokens alone.

        Args:
            padded: Shape ``(B, T, ...)``.

        Returns:
            Shape ``(N, ...)``.
        """
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """The padded batch, 0 where there is no token.

        Args:
            packed: Shape ``(N, ...)``.

        Returns:
            Shape ``(B, T, ...)``.
        """
        if self.index is not None:
            rows = self.size[0] * self.size[1]
            empty = packed.new_zeros(rows, *packed.shape[1:])
            packed = empty.index_copy(0, self.index, packed)
        return packed.unflatten(0, self.size)


def compute_packing(attention_mask: Tensor) -> Packing:
    """Find the real tokens of a batch.

    On a GPU this waits for the device: the numbers of texts of each length decide what is launched.

    Args:
        attention_mask: 1 for real tokens, 0 for padding, shape ``(B, T)``.
    """
    real = attention_mask.bool()
    size = (real.shape[0], real.shape[1])
    lengths = real.sum(1)
    if bool(real.all()):
        return Packing(size, None, (size,))
    order = torch.argsort(lengths, stable=True)
    places = torch.arange(real.numel(), device=real.device).view(size)
    index = places[order][real[order]]
    values, counts = torch.unique_consecutive(lengths[order], return_counts=True)
    pairs = zip(counts.tolist(), values.tolist(), strict=True)
    groups = tuple(pair for pair in pairs if pair[1] > 0)
    return Packing(size, index, groups or ((0, 1),))  # a batch of padding alone: no texts
