"""Masks without training: structures are scored, and those with the largest scores are kept.

The scores of each kind of structure are compared as the exportable shapes allow: heads and
intermediate units with those of the same layer, hidden dimensions and layers with all others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.hard_concrete import top_k
from bge_pruning.models.structural_pruning import SHAPE_FIELDS, PruningMasks


@dataclass(frozen=True)
class Importance:
    """Scores of structures; larger is more important.

    Attributes:
        head: Shape ``(L, A)``.
        intermediate: Shape ``(L, F)``.
        layer: Shape ``(L,)``.
        hidden: Shape ``(H,)``.
    """

    head: Tensor
    intermediate: Tensor
    layer: Tensor
    hidden: Tensor


def masks_of_importance(importance: Importance, shape: EncoderShape) -> PruningMasks:
    """Binary gates, on the CPU, of the most important structures; ties go to the lower index.

    Args:
        importance: Scores.
        shape: Sizes to keep.

    Raises:
        ValueError: If a score is not finite.
    """
    for part in fields(importance):
        if broken := int((~getattr(importance, part.name).isfinite()).sum()):
            raise ValueError(
                f"{broken} scores of importance of axis '{part.name}' are not finite: weights of "
                f"the model are broken. To fix, use another base_model."
            )
    return PruningMasks(
        **{
            axis: top_k(getattr(importance, axis).float().cpu(), getattr(shape, field))
            for axis, field in SHAPE_FIELDS.items()
        }
    )


def random_importance(shape: EncoderShape, seed: int) -> Importance:
    """Uniform scores: masks of them are random sub-networks.

    Args:
        shape: Sizes of the unpruned model.
        seed: Of the scores.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = shape.num_hidden_layers
    return Importance(
        head=torch.rand(layers, shape.num_attention_heads, generator=generator),
        intermediate=torch.rand(layers, shape.intermediate_size, generator=generator),
        layer=torch.rand(layers, generator=generator),
        hidden=torch.rand(shape.hidden_size, generator=generator),
    )


@torch.no_grad()
def magnitude_importance(backbone: XLMRobertaBackbone) -> Importance:
    """Euclidean norm of the parameters of the layers that are removed with a structure.

    ``I(s) = sqrt(sum over parameters w that are cut with s of w^2)``:

    * head: its rows of query, key and value with their biases, and its columns of the output
      projection;
    * unit: its row and bias of the widening projection, and its column of the narrowing one;
    * hidden dimension: in all layers, its columns of query, key, value and the widening
      projection, its rows and biases of both output projections, its entries of both LayerNorms;
    * layer: all its parameters.

    Embedding tables are not counted: their many rows of rare tokens would outweigh the layers.

    Args:
        backbone: The unpruned encoder.
    """
    layers = [_squares_of_layer(layer) for layer in backbone.encoder.layer]
    return Importance(
        head=torch.stack([layer.head for layer in layers]).sqrt(),
        intermediate=torch.stack([layer.intermediate for layer in layers]).sqrt(),
        layer=torch.stack([layer.layer for layer in layers]).sqrt(),
        hidden=torch.stack([layer.hidden for layer in layers]).sum(0).sqrt(),
    )


def _squares_of_layer(layer: torch.nn.Module) -> Importance:
    """Sums of squares of one layer: shapes ``(A,)``, ``(F,)``, ``()`` and ``(H,)``."""
    attention, output = layer.attention.self, layer.attention.output
    projections = [attention.query, attention.key, attention.value]
    wide, narrow = layer.intermediate.dense, layer.output.dense
    inner = sum(_rows(linear) for linear in projections) + _columns(output.dense)
    hidden = sum(_columns(linear) for linear in [*projections, wide])
    hidden = hidden + _rows(output.dense) + _rows(narrow)
    for norm in (output.LayerNorm, layer.output.LayerNorm):
        hidden = hidden + norm.weight.double().square() + norm.bias.double().square()
    return Importance(
        head=inner.unflatten(0, (-1, attention.head_dim)).sum(1),
        intermediate=_rows(wide) + _columns(narrow),
        layer=torch.stack([p.double().square().sum() for p in layer.parameters()]).sum(),
        hidden=hidden,
    )


def _rows(linear: torch.nn.Linear) -> Tensor:
    """Sum of squares of each output's weights and bias, shape ``(out,)``."""
    return linear.weight.double().square().sum(1) + linear.bias.double().square()


def _columns(linear: torch.nn.Linear) -> Tensor:
    """Sum of squares of each input's weights, shape ``(in,)``."""
    return linear.weight.double().square().sum(0)
