"""What a model is expected to cost under gates: parameters and operations.

The formulas are those of true sizes, see :mod:`bge_pruning.models.encoder_shape`; the expected
counts are exact at binary gates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bge_pruning.models.encoder_shape import (
    EncoderShape,
    ParameterCount,
    layer_flops,
    layer_parameters,
    outer_parameters,
)


def expected_parameters(shape: EncoderShape, probabilities: dict[str, Tensor]) -> ParameterCount:
    """Expected parameters of gates with these open probabilities.

    A polynomial in the probabilities. It is exact at binary gates: biases, LayerNorms, embedding
    columns, head inputs and the pooler included.

    Args:
        shape: Shape of the unpruned model.
        probabilities: Open probabilities by axis; an absent axis is fully open.

    Returns:
        Scalar tensors (plain numbers for parts that no gate touches).
    """
    sizes = _expected_sizes(shape, probabilities)
    encoder = _sum_layers(shape, probabilities, layer_parameters(*sizes, shape.head_dim))
    embeddings, pooler, output_heads = outer_parameters(sizes[0], shape)
    return ParameterCount(encoder, embeddings, pooler, output_heads)


def expected_operations(
    shape: EncoderShape, probabilities: dict[str, Tensor], length: int
) -> Tensor:
    """Expected floating-point operations of embedding a text, see :func:`forward_flops`.

    Args:
        shape: Shape of the unpruned model.
        probabilities: Open probabilities by axis; an absent axis is fully open.
        length: Tokens of the text.

    Returns:
        A scalar, exact at binary gates.
    """
    sizes = _expected_sizes(shape, probabilities)
    return _sum_layers(shape, probabilities, layer_flops(*sizes, shape.head_dim, length))


def _expected_sizes(
    shape: EncoderShape, probabilities: dict[str, Tensor]
) -> tuple[Tensor | int, Tensor | int, Tensor | int]:
    """Hidden size, and heads and units by layer."""

    def total(axis: str, size: int) -> Tensor | int:
        return probabilities[axis].sum(-1) if axis in probabilities else size

    return (
        total("hidden", shape.hidden_size),
        total("head", shape.num_attention_heads),
        total("intermediate", shape.intermediate_size),
    )


def _sum_layers(
    shape: EncoderShape, probabilities: dict[str, Tensor], per_layer: Tensor | float
) -> Tensor:
    costs = torch.as_tensor(per_layer).expand(shape.num_hidden_layers)
    if "layer" in probabilities:
        costs = costs * probabilities["layer"]
    return costs.sum()
