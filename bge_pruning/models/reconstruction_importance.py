"""Importance of heads and units by how well the others could make up for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from bge_pruning.models.activation_importance import activation_importance
from bge_pruning.models.bge_m3_backbone import ResidualOutput, XLMRobertaBackbone
from bge_pruning.models.importance import Importance
from bge_pruning.models.least_squares import Moments, elimination_order, joined


@torch.no_grad()
def reconstruction_importance(
    backbone: XLMRobertaBackbone, batches: Iterable[tuple[Tensor, Tensor]]
) -> Importance:
    """Heads and units in the order in which their layer's output can best do without them.

    Those go first without which the output projection, fitted again to the ones that are left,
    comes nearest to what it gave (see :func:`elimination_order`): of two that say the same, one is
    not needed. Hidden dimensions and layers are scored as by :func:`activation_importance`.

    Args:
        backbone: The unpruned encoder, in evaluation mode.
        batches: Token ids and mask, shape ``(B, T)``; padding does not count.

    Returns:
        Scores; those of heads and units are places in the order, from 0 for the first to go.

    Raises:
        ValueError: If there is no token.
    """
    outputs = [(layer.attention.output, layer.output) for layer in backbone.encoder.layer]
    moments = {output: _listen(output) for pair in outputs for output in pair}
    try:
        measured = activation_importance(backbone, batches)
    finally:
        for _, handle in moments.values():
            handle.remove()

    def places(output: ResidualOutput, group: int) -> Tensor:
        order = elimination_order(moments[output][0].xx, joined(output.dense), group)
        return order.argsort().double()

    return replace(
        measured,
        head=torch.stack([places(heads, backbone.shape.head_dim) for heads, _ in outputs]),
        intermediate=torch.stack([places(units, 1) for _, units in outputs]),
    )


def _listen(output: ResidualOutput) -> tuple[Moments, torch.utils.hooks.RemovableHandle]:
    """Moments of the inputs of an output projection, filled by what passes through it."""
    moments = Moments(output.dense.in_features, 0, output.dense.weight.device)

    def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        moments.add(given[0], given[0][:, :0])

    return moments, output.register_forward_pre_hook(add)
