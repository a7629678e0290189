"""Importance of heads and units by how well the others could make up for them.

Without the group ``g`` of its inputs, an output projection ``W`` that is fitted again loses

``tr(W_g^T [(X^T X)^-1]_gg^-1 W_g)``

(the optimal brain surgeon, see :mod:`bge_pruning.selection.least_squares`). Not every error counts
alike. With the gradients ``g_t`` of :mod:`bge_pruning.selection.sensitivity`, tokens and dimensions
are taken apart as in K-FAC (Martens and Grosse, arXiv:1503.05671): ``X^T X`` becomes
``sum_t |g_t|^2 x_t x_t^T``, and the columns of ``W`` are measured by ``G = sum_t g_t g_t^T``:
``W`` becomes ``W G^(1/2)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import ResidualOutput, XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.packing import Packing
from bge_pruning.selection.importance import Importance, activation_importance
from bge_pruning.selection.least_squares import elimination_order, joined
from bge_pruning.selection.sensitivity import probe


def reconstruction_importance(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    batches: Iterable[tuple[Tensor, Tensor]],
    seed: int = 0,
) -> Importance:
    """Heads and units in the order in which the model's outputs can best do without them.

    Those go first without which the output projection, fitted again to the ones that are left,
    comes nearest to what it gave (see :func:`elimination_order`): of two that say the same, one is
    not needed. An error counts by what it does to the outputs of its text, to first order. Their
    scores are places in the order, from 0 for the first to go. Hidden dimensions and layers are
    scored as by :func:`activation_importance`.

    Args:
        backbone: The unpruned encoder, in evaluation mode, as its heads.
        batches: Token ids and mask, shape ``(B, T)``; padding does not count.
        seed: Of the directions in which the outputs are probed.
    """
    batches = list(batches)
    measured = activation_importance(backbone, batches)
    outputs = [(layer.attention.output, layer.output) for layer in backbone.encoder.layer]
    sublayers = {output: _Sublayer(output) for pair in outputs for output in pair}
    hear = {output: sublayer.add for output, sublayer in sublayers.items()}
    probe(backbone, heads, batches, hear, seed)
    head_dim = backbone.shape.head_dim
    return replace(
        measured,
        head=torch.stack([sublayers[attention].places(head_dim) for attention, _ in outputs]),
        intermediate=torch.stack([sublayers[units].places(1) for _, units in outputs]),
    )


class _Sublayer:
    """Inputs of an output projection, ``xx``, and gradients of what it gives, ``gg``.

    Both are sums over tokens, see the module's equation.
    """

    def __init__(self, output: ResidualOutput) -> None:
        self.output = output
        weight = output.dense.weight
        options = {"dtype": torch.float64, "device": weight.device}
        self.xx = torch.zeros(weight.shape[1] + 1, weight.shape[1] + 1, **options)
        self.gg = torch.zeros(weight.shape[0], weight.shape[0], **options)

    def add(self, inputs: Tensor, gradients: Tensor, packing: Packing) -> None:
        """Add packed tokens, see :data:`bge_pruning.selection.sensitivity.Hear`."""
        x = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        weighted = x * gradients.norm(dim=1, keepdim=True)
        self.xx += weighted.T @ weighted
        self.gg += gradients.T @ gradients

    @torch.no_grad()
    def places(self, group: int) -> Tensor:
        """Place of each group of inputs in the order of elimination, shape ``(groups,)``."""
        values, vectors = torch.linalg.eigh(self.gg)
        felt = joined(self.output.dense) @ (vectors * values.clamp(min=0).sqrt())
        return elimination_order(self.xx, felt, group).argsort().double()
