"""The sizes of an encoder, what they cost in parameters, and which sizes can be exported.

Every parameter count of the project comes from :func:`layer_parameters` and
:func:`count_parameters`; the L0 module feeds the same formulas with expected sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

Size = TypeVar("Size", int, float, Tensor)
# What a shape costs, such as :func:`encoder_parameters`.
Cost = Callable[["EncoderShape"], float]
# Matrices of multiples of 8 are what tensor cores of half precision ask for.
FINEST_UNITS = 8

# The names of the published plan, used in YAML files, for Hugging Face's names used in the code.
YAML_NAMES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an XLM-R encoder with BGE-M3's output heads, uniform over its layers.

    Attributes:
        hidden_size: ``H``.
        num_attention_heads: ``A``, of every layer.
        num_hidden_layers: ``L``.
        intermediate_size: ``F``, of every layer.
        vocab_size: ``V``.
        head_dim: ``D``, size of one attention head; pruning never changes it.
        max_position_embeddings: Rows of the position table.
        type_vocab_size: Rows of the token-type table.
        pooler: Whether the (unused) pooler is there.
        sparse_head: Whether there is a sparse head, ``Linear(H, 1)``.
        colbert_dim: Output size of the multi-vector head, 0 if there is none.
    """

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int
    head_dim: int
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    pooler: bool = True
    sparse_head: bool = True
    colbert_dim: int = 0

    def describe(self) -> str:
        """The sizes that pruning can change, in words."""
        return (
            f"{self.num_hidden_layers} layers, hidden {self.hidden_size}, "
            f"{self.num_attention_heads} heads, intermediate {self.intermediate_size}"
        )


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. The fields are ints for real models, tensors for expected counts."""

    encoder: int | Tensor
    embeddings: int | Tensor
    pooler: int | Tensor
    heads: int | Tensor

    @property
    def total(self) -> int | Tensor:
        """Sum of the parts."""
        return self.encoder + self.embeddings + self.pooler + self.heads

    def as_dict(self) -> dict[str, int | Tensor]:
        """Parts and total by name."""
        return {
            "encoder": self.encoder,
            "embeddings": self.embeddings,
            "pooler": self.pooler,
            "heads": self.heads,
            "total": self.total,
        }


def layer_parameters(hidden: Size, heads: Size, units: Size, head_dim: int) -> Size:
    """Parameters of one transformer layer.

    Query, key, value and output projections cost ``4 D H`` weights and ``3 D`` biases per head;
    an intermediate unit costs one row, one bias and one column, ``2 H + 1``; the output biases
    and the two LayerNorms cost ``6 H``.

    Args:
        hidden: Hidden size, a number or a scalar tensor.
        heads: Heads of the layer, a number or a tensor of any shape.
        units: Intermediate units of the layer, same shape as ``heads``.
        head_dim: Size of one head.

    Returns:
        Parameters, same shape as ``heads``.
    """
    per_head = 4 * head_dim * hidden + 3 * head_dim
    return heads * per_head + units * (2 * hidden + 1) + 6 * hidden


def outer_parameters(hidden: Size, shape: EncoderShape) -> tuple[Size, Size, Size]:
    """Parameters of the embeddings, the pooler and the output heads at a hidden size.

    Args:
        hidden: Hidden size, a number or a scalar tensor.
        shape: Gives the table rows and which outer parts exist; its own hidden size is not used.

    Returns:
        ``(embeddings, pooler, heads)``.
    """
    rows = shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size
    embeddings = (rows + 2) * hidden
    pooler = (hidden + 1) * hidden * int(shape.pooler)
    heads = (hidden + 1) * (shape.colbert_dim + int(shape.sparse_head))
    return embeddings, pooler, heads


def count_parameters(shape: EncoderShape) -> ParameterCount:
    """Exact parameter count of a model of this shape."""
    layer = layer_parameters(
        shape.hidden_size, shape.num_attention_heads, shape.intermediate_size, shape.head_dim
    )
    embeddings, pooler, heads = outer_parameters(shape.hidden_size, shape)
    return ParameterCount(shape.num_hidden_layers * layer, embeddings, pooler, heads)


def layer_flops(hidden: Size, heads: Size, units: Size, head_dim: int, length: int) -> Size:
    """Floating-point operations of one layer for a text.

    2 for each weight and token, ``4 T A D`` for a token's attention.

    Args:
        hidden: Hidden size, a number or a scalar tensor.
        heads: Heads of the layer, a number or a tensor of any shape.
        units: Intermediate units of the layer, same shape as ``heads``.
        head_dim: Size of one head.
        length: Tokens of the text, ``T``.

    Returns:
        Operations, same shape as ``heads``.
    """
    weights = layer_parameters(hidden, heads, units, head_dim)
    return 2.0 * weights * length + 4.0 * heads * head_dim * length * length


def forward_flops(shape: EncoderShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of embedding texts, padding left out; a training step takes thrice.

    Args:
        shape: Sizes of the encoder.
        lengths: Tokens of each text.
    """
    sizes = (shape.hidden_size, shape.num_attention_heads, shape.intermediate_size, shape.head_dim)
    return shape.num_hidden_layers * sum(layer_flops(*sizes, length) for length in lengths)


def encoder_parameters(shape: EncoderShape) -> int:
    """Parameters of the layers: the cost of a shape that a parameter budget is about."""
    return count_parameters(shape).encoder


def check_exportable(target: EncoderShape, source: EncoderShape) -> None:
    """Refuse a target that transformers could not load or that the source does not contain.

    Transformers, text-embeddings-inference and vLLM all need
    ``hidden_size == num_attention_heads * head_dim``.

    Args:
        target: The wanted shape.
        source: The shape of the unpruned model.

    Raises:
        ValueError: If a size is below 1, above the source's, or hidden size and heads disagree;
            the message names the nearest shapes that work.
    """
    for field, yaml_name in YAML_NAMES.items():
        size, limit = getattr(target, field), getattr(source, field)
        if not 1 <= size <= limit:
            raise ValueError(
                f"target {yaml_name} {size} is not in [1, {limit}], the source's size. "
                f"To fix, set {yaml_name} to {min(max(size, 1), limit)} or another size in range."
            )
    if target.head_dim != source.head_dim:
        raise ValueError(
            f"target head_dim {target.head_dim} differs from the source's {source.head_dim}: heads "
            f"are kept or removed whole. To fix, keep it."
        )
    needed = target.num_attention_heads * target.head_dim
    if needed != target.hidden_size:
        nearest = " or ".join(
            f"d_model={heads * target.head_dim} with n_heads={heads}"
            for heads in _nearest_heads(target, source)
        )
        raise ValueError(
            f"num_attention_heads {target.num_attention_heads} with head_dim {target.head_dim} "
            f"needs d_model {needed}, not {target.hidden_size}: transformers could not load the "
            f"result. To fix, set {nearest}."
        )


def _nearest_heads(target: EncoderShape, source: EncoderShape) -> list[int]:
    """Head counts near the target's hidden size and near its head count."""
    below = target.hidden_size // target.head_dim
    wanted = {below, -(-target.hidden_size // target.head_dim), target.num_attention_heads}
    return sorted({min(max(heads, 1), source.num_attention_heads) for heads in wanted})


def exportable_shapes(
    source: EncoderShape,
    axes: frozenset[str],
    budget: float,
    multiple_of: int,
    cost: Cost = encoder_parameters,
) -> Iterator[EncoderShape]:
    """Exportable shapes whose cost is as close to a budget as each choice allows.

    For every number of layers and of heads (with the hidden size that goes with them) the
    intermediate size nearest to the budget is taken.

    Args:
        source: Shape of the unpruned model.
        axes: Axes that may shrink; heads and hidden size shrink only together.
        budget: What the shapes may cost.
        multiple_of: Granularity of the intermediate size.
        cost: Of a shape; grows by as much with every intermediate unit.

    Yields:
        Shapes, not sorted; none if only the layers and heads cannot be combined.
    """
    layer_sizes = range(1, source.num_hidden_layers + 1)
    head_sizes = range(1, source.num_attention_heads + 1)
    if "layer" not in axes:
        layer_sizes = layer_sizes[-1:]
    if not {"head", "hidden"} <= axes:
        head_sizes = head_sizes[-1:]
    for layers in layer_sizes:
        for heads in head_sizes:
            yield _fit_intermediate(source, axes, layers, heads, budget, multiple_of, cost)


def _fit_intermediate(
    source: EncoderShape,
    axes: frozenset[str],
    layers: int,
    heads: int,
    budget: float,
    multiple_of: int,
    cost: Cost,
) -> EncoderShape:
    """The shape with these layers and heads whose intermediate size best fits the budget."""
    hidden = source.hidden_size
    if heads != source.num_attention_heads:
        hidden = heads * source.head_dim
    shape = replace(source, hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers)
    if "intermediate" not in axes:
        return shape
    none, one = (cost(replace(shape, intermediate_size=units)) for units in (0, 1))
    units = multiple_of * round((budget - none) / (one - none) / multiple_of)
    units = min(max(units, multiple_of), source.intermediate_size)
    return replace(shape, intermediate_size=units)


def shapes_near_budget(
    source: EncoderShape,
    axes: frozenset[str],
    budget: float,
    multiple_of: int = 64,
    tolerance: float = 0.005,
    cost: Cost = encoder_parameters,
) -> list[EncoderShape]:
    """Exportable shapes that meet a budget.

    For every number of layers and of heads the granularity of the intermediate size is halved, down
    to ``FINEST_UNITS``, until the shape is within the tolerance. If none at all is, the granularity
    goes on to 1, and if none ever is, the nearest shape alone is returned.

    Args:
        source: Shape of the unpruned model.
        axes: Axes that may shrink.
        budget: What the shapes may cost.
        multiple_of: First granularity to try; 64 keeps tensor cores busy.
        tolerance: Largest relative distance from the budget.
        cost: Of a shape, the parameters of its layers if not given.

    Returns:
        At least one shape, by layers and heads.

    Raises:
        ValueError: If the budget is not above 0 and at most what the source costs.
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
