"""Shapes near a budget that can be exported, and which of them the gates prefer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from bge_pruning.models.encoder_shape import (
    FINEST_UNITS,
    Cost,
    EncoderShape,
    count_parameters,
    encoder_parameters,
    forward_flops,
)
from bge_pruning.models.hard_concrete import open_probability
from bge_pruning.models.structural_pruning import SHAPE_FIELDS


def exportable_shapes(
    source: EncoderShape,
    axes: frozenset[str],
    budget: float,
    multiple_of: int,
    cost: Cost = encoder_parameters,
) -> Iterator[EncoderShape]:
    """Exportable shapes whose cost is as close to a budget as each choice allows.

    For every number of layers and of heads (with the hidden size that goes with them; they shrink
    only together) the intermediate size, a multiple of a number, nearest to the budget is taken.
    The cost must be linear in it.
    """
    layer_sizes = range(1, source.num_hidden_layers + 1)
    head_sizes = range(1, source.num_attention_heads + 1)
    if "layer" not in axes:
        layer_sizes = layer_sizes[-1:]
    if not {"head", "hidden"} <= axes:
        head_sizes = head_sizes[-1:]
    for layers in layer_sizes:
        for heads in head_sizes:
            whole = heads == source.num_attention_heads
            hidden = source.hidden_size if whole else heads * source.head_dim
            sizes = {"num_hidden_layers": layers, "num_attention_heads": heads}
            shape = replace(source, hidden_size=hidden, **sizes)
            fits = "intermediate" in axes
            yield _fit_intermediate(shape, budget, multiple_of, cost) if fits else shape


def _fit_intermediate(
    shape: EncoderShape, budget: float, multiple_of: int, cost: Cost
) -> EncoderShape:
    """Lower the intermediate size to the one that best fits the budget."""
    none, one = (cost(replace(shape, intermediate_size=units)) for units in (0, 1))
    units = multiple_of * round((budget - none) / (one - none) / multiple_of)
    units = min(max(units, multiple_of), shape.intermediate_size)
    return replace(shape, intermediate_size=units)


def shapes_near_budget(
    source: EncoderShape,
    axes: frozenset[str],
    budget: float,
    multiple_of: int = 64,
    tolerance: float = 0.005,
    cost: Cost = encoder_parameters,
) -> list[EncoderShape]:
    """Exportable shapes that meet a budget, at least one, by layers and heads.

    For every number of layers and of heads the granularity of the intermediate size is halved, down
    to ``FINEST_UNITS``, until the shape is within the relative tolerance. If no shape is, the
    granularity is halved further, down to 1; if still none is, only the nearest shape is returned.
    It begins at 64, which keeps tensor cores busy. The cost is the parameters of the layers.

    Raises:
        ValueError: If the budget is not above 0, or above the cost of the source.
    """
    limit = cost(source)
    if not 0 < budget <= limit:
        change = "lower" if budget > limit else "above 0"
        raise ValueError(
            f"a budget of {budget:,.0f} encoder parameters is not in (0, {limit:,}], the source's "
            f"encoder. To fix, set l0_module.target_parameters or l0_module.target_density "
            f"{change}."
        )

    def distance(shape: EncoderShape) -> float:
        return abs(cost(shape) - budget) / budget

    found: dict[tuple[int, int], EncoderShape] = {}
    while True:
        shapes = list(exportable_shapes(source, axes, budget, multiple_of, cost))
        for shape in shapes:
            if distance(shape) <= tolerance:
                found.setdefault((shape.num_hidden_layers, shape.num_attention_heads), shape)
        if multiple_of == 1 or (found and multiple_of <= FINEST_UNITS):
            return [found[place] for place in sorted(found)] or [min(shapes, key=distance)]
        multiple_of //= 2


# How far the depth of the best shape may move when the width shrinks by a head.
DEPTHS_AROUND = 1


@lru_cache(maxsize=16)
def shapes_of_budget(
    shape: EncoderShape,
    axes: tuple[str, ...],
    parameters: float | None,
    speedup: float | None,
    length: int,
) -> tuple[EncoderShape, ...]:
    """Exportable shapes that gates with a budget choose among; cached, as every step needs them.

    The budget is encoder parameters or, for texts of ``length`` tokens, a speed-up.
    """
    if speedup is None:
        return tuple(shapes_near_budget(shape, frozenset(axes), parameters))

    def cost(candidate: EncoderShape) -> float:
        return forward_flops(candidate, [length])

    return tuple(shapes_near_budget(shape, frozenset(axes), cost(shape) / speedup, cost=cost))


def best_shape(
    shapes: Sequence[EncoderShape], error: Callable[[EncoderShape], float]
) -> EncoderShape:
    """Find the shape with the least error without computing all errors.

    All depths are tried at the full width, then at every smaller width those around the best depth
    so far, until a width brings no improvement.
    """
    widths = sorted({shape.num_attention_heads for shape in shapes}, reverse=True)
    best, least = None, float("inf")
    for width in widths:
        tried = [shape for shape in shapes if shape.num_attention_heads == width]
        if best is not None:
            depth = best.num_hidden_layers
            tried = [s for s in tried if abs(s.num_hidden_layers - depth) <= DEPTHS_AROUND]
        errors = {shape: error(shape) for shape in tried}
        if errors and min(errors.values()) < least:
            best = min(errors, key=errors.__getitem__)
            least = errors[best]
        elif errors:
            break
    return best


class MaskLikelihood:
    """How well a shape agrees with the gates: the log-likelihood of its top-k mask.

    Each gate is weighted by the parameters it controls. Heads and units of removed layers do not
    count, because the layer's own gate speaks for them.
    """

    def __init__(self, shape: EncoderShape, log_alpha: Mapping[str, Tensor]) -> None:
        self._tables = {a: _keep_log_likelihoods(gates.detach()) for a, gates in log_alpha.items()}
        self._weights = _parameters_per_gate(shape)
        self._order = torch.arange(shape.num_hidden_layers)
        if "layer" in log_alpha:
            gates = log_alpha["layer"].detach()
            self._order = torch.sort(gates, descending=True, stable=True).indices.cpu()

    def __call__(self, candidate: EncoderShape) -> float:
        """Log-likelihood of a candidate; larger is better."""
        kept_layers = self._order[: candidate.num_hidden_layers]
        total = 0.0
        for axis, table in self._tables.items():
            column = table[..., getattr(candidate, SHAPE_FIELDS[axis])]
            rows = column[kept_layers] if axis in ("head", "intermediate") else column
            total += self._weights[axis] * float(rows.sum())
        return total


def _keep_log_likelihoods(log_alpha: Tensor) -> Tensor:
    """Log-likelihood of keeping the top k of the last dimension, for k = 0..n."""
    p = open_probability(log_alpha.double().cpu()).sort(dim=-1, descending=True).values
    zero = p.new_zeros((*p.shape[:-1], 1))
    kept = torch.cat([zero, p.log().cumsum(-1)], dim=-1)
    closed = torch.cat([zero, (1.0 - p).log().cumsum(-1)], dim=-1)
    return kept + closed[..., -1:] - closed


def _parameters_per_gate(shape: EncoderShape) -> dict[str, int]:
    """Encoder parameters that closing one gate of the unpruned model removes."""
    full = count_parameters(shape).encoder
    layers = shape.num_hidden_layers
    per_layer = {
        axis: full - count_parameters(replace(shape, **{field: getattr(shape, field) - 1})).encoder
        for axis, field in SHAPE_FIELDS.items()
    }
    # A head or unit gate belongs to one layer; the counts above close one in every layer.
    return {
        axis: count // layers if axis in ("head", "intermediate") else count
        for axis, count in per_layer.items()
    }
