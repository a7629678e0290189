"""Finds the structures to keep, and cuts linear layers, embeddings and LayerNorms to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bge_pruning.models.encoder_shape import EncoderShape

AXES = ("head", "hidden", "intermediate", "layer")
# The field of an encoder's shape with the size of each axis.
SHAPE_FIELDS = {
    "head": "num_attention_heads",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layer": "num_hidden_layers",
}


@dataclass(frozen=True)
class PruningMasks:
    """Gate values of one sub-network, ``(L, A)``, ``(L, F)``, ``(L,)`` and ``(H,)``.

    An axis that is ``None`` is fully open. All layers share one set of hidden dimensions.
    """

    head: Tensor | None = None
    intermediate: Tensor | None = None
    layer: Tensor | None = None
    hidden: Tensor | None = None

    def of_layers(self, count: int, head_dim: int) -> list[PruningMasks]:
        """Gates of each layer, of shapes ``(A * head_dim,)``, ``(F,)``, ``()``, and ``(H,)``.

        The gate of a head is repeated for each of its dimensions; the last are the same for all.
        """
        head = None if self.head is None else self.head.repeat_interleave(head_dim, dim=1)
        # One split of each axis, whose gradient is one operation for all layers.
        rows = [
            [None] * count if z is None else z.unbind(0)
            for z in (head, self.intermediate, self.layer)
        ]
        return [PruningMasks(*gates, self.hidden) for gates in zip(*rows, strict=True)]

    def is_binary(self) -> bool:
        """Whether every gate is exactly 0 or 1."""
        gates = [z for z in vars(self).values() if z is not None]
        return all(bool(((z == 0) | (z == 1)).all()) for z in gates)


@dataclass(frozen=True)
class KeepIndices:
    """Indices of kept structures, ascending, in the source model's numbering.

    Heads and intermediate units have one list per *kept* layer.
    """

    layer: list[int]
    hidden: list[int]
    head: list[list[int]]
    intermediate: list[list[int]]

    def as_dict(self) -> dict[str, list]:
        """Plain lists, for JSON."""
        return dict(vars(self))


def compute_keep_indices(masks: PruningMasks, source: EncoderShape) -> KeepIndices:
    """Indices of the open gates, which must be binary and leave a layer and a hidden dimension."""
    _check_shapes(masks, source)
    if not masks.is_binary():
        raise ValueError(
            "gates are not all 0 or 1, so cutting would change the outputs. To fix, extract from "
            "deterministic gates (L0Module.deterministic_masks)."
        )
    layer = _open(masks.layer, source.num_hidden_layers)
    hidden = _open(masks.hidden, source.hidden_size)
    if not layer or not hidden:
        empty = "layer" if not layer else "hidden"
        raise ValueError(
            f"no {empty} gate is open: nothing would be left. To fix, keep at least 1."
        )

    def inner(gates: Tensor | None, size: int) -> list[list[int]]:
        return [_open(None if gates is None else gates[i], size) for i in layer]

    head = inner(masks.head, source.num_attention_heads)
    return KeepIndices(layer, hidden, head, inner(masks.intermediate, source.intermediate_size))


def _check_shapes(masks: PruningMasks, source: EncoderShape) -> None:
    for axis, shape in source.gate_shapes.items():
        gates = getattr(masks, axis)
        if gates is not None and tuple(gates.shape) != shape:
            raise ValueError(
                f"{axis} gates have shape {tuple(gates.shape)}, expected {shape}: they belong to "
                f"another model. To fix, use the gates that were trained with this one."
            )


def _open(gates: Tensor | None, size: int) -> list[int]:
    return list(range(size)) if gates is None else gates.nonzero().flatten().tolist()


def head_rows(heads: list[int], head_dim: int) -> list[int]:
    """Rows of a query, key or value projection that belong to the given heads."""
    return [head * head_dim + d for head in heads for d in range(head_dim)]


@torch.no_grad()
def prune_linear(layer: nn.Linear, keep: list[int], dim: int) -> None:
    """Cut a linear layer in place to ascending indices of outputs (``dim`` 0) or inputs (1)."""
    if dim not in (0, 1):
        raise ValueError(
            f"dim {dim} is neither 0 (outputs) nor 1 (inputs). To fix, use one of them."
        )
    _cut(layer, "weight", keep, dim)
    if dim == 0 and layer.bias is not None:
        _cut(layer, "bias", keep, dim)
    layer.out_features, layer.in_features = layer.weight.shape


@torch.no_grad()
def prune_embedding(table: nn.Embedding, keep: list[int]) -> None:
    """Keep the given columns of an embedding table, in place."""
    _cut(table, "weight", keep, 1)
    table.embedding_dim = len(keep)


@torch.no_grad()
def prune_layer_norm(norm: nn.LayerNorm, keep: list[int]) -> None:
    """Keep the given dimensions of a LayerNorm, in place."""
    _cut(norm, "weight", keep, 0)
    _cut(norm, "bias", keep, 0)
    norm.normalized_shape = (len(keep),)


def _cut(module: nn.Module, name: str, keep: list[int], dim: int) -> None:
    """Replace a parameter by its kept part, without a copy if all of it is kept."""
    value = getattr(module, name)
    if keep == list(range(value.shape[dim])):
        return
    index = torch.tensor(keep, dtype=torch.long, device=value.device)
    cut = value.index_select(dim, index).contiguous()
    setattr(module, name, nn.Parameter(cut, requires_grad=value.requires_grad))
