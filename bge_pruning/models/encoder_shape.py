"""The sizes of an encoder and what they cost: parameters, operations, memory of a training step.

Every parameter count of the project comes from :func:`layer_parameters` and
:func:`count_parameters`; the L0 module feeds the same formulas with expected sizes.

Expected counts use the formulas of true sizes and are exact at binary gates.

What autograd keeps of a layer for the backward pass, in values a token, follows from
:mod:`bge_pruning.models.bge_m3_backbone`: the input of the projections, both normalised sums and
what lies between the halves (``4 H``), and the layer's output before its gate (``H``); query, key,
value, and the context before and after concatenation (``5 A D``); the units before and after the
activation (``2 F``). None of it is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Size = TypeVar("Size", int, float, Tensor)
# Computes the cost of a shape, for example :func:`encoder_parameters`.
Cost = Callable[["EncoderShape"], float]
# Tensor cores need sizes that are multiples of 8 in half precision.
FINEST_UNITS = 8
# Names in YAML files by Hugging Face's names, which the code uses.
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

    Pruning never changes ``head_dim``, the size of one attention head. The pooler is not used. The
    sparse head is ``Linear(H, 1)``; ``colbert_dim`` is the output size of the multi-vector head, 0
    if there is none.
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

    @property
    def layer_sizes(self) -> tuple[int, int, int, int]:
        """Hidden size, heads, units and the size of a head, as :func:`layer_parameters` asks."""
        return self.hidden_size, self.num_attention_heads, self.intermediate_size, self.head_dim

    @property
    def gate_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the gates of each axis."""
        layers = self.num_hidden_layers
        return {
            "head": (layers, self.num_attention_heads),
            "intermediate": (layers, self.intermediate_size),
            "layer": (layers,),
            "hidden": (self.hidden_size,),
        }

    def describe(self) -> str:
        """Describe the sizes that pruning can change."""
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
        return {**vars(self), "total": self.total}


def layer_parameters(hidden: Size, heads: Size, units: Size, head_dim: int) -> Size:
    """Parameters of one transformer layer, same shape as ``heads``.

    Query, key, value and output projections cost ``4 D H`` weights and ``3 D`` biases per head;
    an intermediate unit costs one row, one bias and one column, ``2 H + 1``; the output biases
    and the two LayerNorms cost ``6 H``. Heads and units may be tensors of one shape.
    """
    per_head = 4 * head_dim * hidden + 3 * head_dim
    return heads * per_head + units * (2 * hidden + 1) + 6 * hidden


def outer_parameters(hidden: Size, shape: EncoderShape) -> tuple[Size, Size, Size]:
    """Parameters of embeddings, pooler and output heads at a hidden size, not that of ``shape``."""
    rows = shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size
    embeddings = (rows + 2) * hidden
    pooler = (hidden + 1) * hidden * int(shape.pooler)
    heads = (hidden + 1) * (shape.colbert_dim + int(shape.sparse_head))
    return embeddings, pooler, heads


def count_parameters(shape: EncoderShape) -> ParameterCount:
    """Exact parameter count of a model of this shape."""
    layer = layer_parameters(*shape.layer_sizes)
    embeddings, pooler, heads = outer_parameters(shape.hidden_size, shape)
    return ParameterCount(shape.num_hidden_layers * layer, embeddings, pooler, heads)


def layer_flops(hidden: Size, heads: Size, units: Size, head_dim: int, length: int) -> Size:
    """Floating-point operations of one layer for a text, arguments as in :func:`layer_parameters`.

    There are 2 for each weight and token, and ``4 T A D`` for a token's attention.
    """
    weights = layer_parameters(hidden, heads, units, head_dim)
    return 2.0 * weights * length + 4.0 * heads * head_dim * length * length


def forward_flops(shape: EncoderShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of embedding texts without padding; a training step takes 3x."""
    flops = sum(layer_flops(*shape.layer_sizes, length) for length in lengths)
    return shape.num_hidden_layers * flops


def encoder_parameters(shape: EncoderShape) -> int:
    """Parameters of the layers, which a parameter budget limits."""
    return count_parameters(shape).encoder


def check_exportable(target: EncoderShape, source: EncoderShape) -> None:
    """Refuse a target that transformers could not load or that the source does not contain.

    Transformers, text-embeddings-inference and vLLM all need
    ``hidden_size == num_attention_heads * head_dim``.

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


def expected_parameters(shape: EncoderShape, probabilities: dict[str, Tensor]) -> ParameterCount:
    """Expected parameters of gates with these open probabilities; an absent axis is fully open.

    A polynomial in the probabilities, with plain numbers for parts that no gate touches. It is
    exact at binary gates: biases, LayerNorms, embedding columns, head inputs and the pooler
    included.
    """
    sizes = _expected_sizes(shape, probabilities)
    encoder = _sum_layers(shape, probabilities, layer_parameters(*sizes, shape.head_dim))
    embeddings, pooler, output_heads = outer_parameters(sizes[0], shape)
    return ParameterCount(encoder, embeddings, pooler, output_heads)


def expected_operations(
    shape: EncoderShape, probabilities: dict[str, Tensor], length: int
) -> Tensor | float:
    """Expected floating-point operations of embedding a text, a scalar, exact at binary gates."""
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
) -> Tensor | float:
    # A plain number stays one: a tensor made of it would be on the CPU, where the gates may not be.
    if "layer" in probabilities:
        return (per_layer * probabilities["layer"]).sum()
    if isinstance(per_layer, Tensor):
        return per_layer.expand(shape.num_hidden_layers).sum()
    return shape.num_hidden_layers * per_layer


# Multiples of the units that exist while the gradient of the last layer's units is computed, and
# while a teacher's layer is computed.
TRANSIENT_UNITS, TEACHER_UNITS = 1.5, 2.0
# Copies of rows of the table of words while they are updated, and how many there are at once.
ROW_COPIES, ROWS_AT_ONCE = 4, 16_384


@dataclass(frozen=True)
class LossMemory:
    """Bytes that losses take at once beside the encoder's own.

    Attributes:
        outputs: From the forward to the end of the backward pass.
        comparing: While texts are compared; of a batch in pieces nothing else is in memory then.
        backward: While the gradient of the outputs is computed from that of the loss.
        in_pieces: Whether a batch is computed in pieces, so that the gradients of one are in memory
            with the activations of the next.
    """

    outputs: float = 0.0
    comparing: float = 0.0
    backward: float = 0.0
    in_pieces: bool = False


def step_memory(
    shape: EncoderShape,
    tokens: int,
    gated: bool,
    teacher: bool,
    half: bool = False,
    frozen_embeddings: bool = False,
    checkpointing: bool = False,
    loss: LossMemory = LossMemory(),
    ranks: int = 1,
    frozen_encoder: bool = False,
    drawn_rows: int | None = None,
) -> dict[str, float]:
    """Estimate the peak bytes of tensors in a training step on one device, by part.

    In float32 the estimate agrees with measurements to a few percent. With 16-bit autocast
    (``half``) the inputs of products count half, and a 16-bit copy of every weight is added: 13 %
    more than measured for BGE-M3's sizes on a GPU (64 texts of 512 tokens, gates on all axes,
    compiled LayerNorms). Only real tokens count. The teacher is an unpruned model of the same
    sizes. Several ranks exchange copies of their gradients.

    Args:
        tokens: Real tokens that are computed at once.
        frozen_encoder: Whether the heads are trained alone.
        drawn_rows: Rows of the table of words that have been in a batch: only they have moments,
            and only those of the batch a gradient. ``None`` if all rows have both.

    Returns:
        ``weights and optimizer`` (AdamW's two moments); ``activations or gradients``, the larger of
        the two, because one shrinks in the backward pass as the other grows, or in pieces
        ``activations and gradients``; ``outputs and scores``, ``teacher``, ``exchange``.
    """
    hidden, units = shape.hidden_size, shape.intermediate_size
    inner = shape.num_attention_heads * shape.head_dim
    total, item = int(count_parameters(shape).total), 2.0 if half else 4.0
    layer = tokens * (4.0 * hidden * (5 if gated else 4) + item * (5 * inner + 2 * units))
    if gated:  # weights with their columns scaled by the gates
        layer += 4.0 * (units + inner) * hidden
    layers = shape.num_hidden_layers
    kept = layers * 4.0 * hidden * tokens + layer if checkpointing else layers * layer
    rows = shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size
    untrained, drawn = rows if frozen_embeddings else 0, 0
    if not frozen_embeddings and drawn_rows is not None:
        untrained, drawn = shape.vocab_size, drawn_rows
    table = (rows - untrained) * hidden
    trained = total - untrained * hidden
    if frozen_encoder:  # which keeps no activations; the heads get its last states
        kept, table, drawn, trained = layer, 0, 0, count_parameters(shape).heads
    gradients = 4.0 * (trained + min(drawn, tokens) * hidden)
    copied = ROW_COPIES * min(drawn, max(tokens, ROWS_AT_ONCE))
    received = 2 * ranks * min(drawn, tokens) if ranks > 1 else 0  # from all ranks, and together
    update = 4.0 * max(copied, received) * hidden
    transient = tokens * item * units * (TEACHER_UNITS if teacher else TRANSIENT_UNITS)
    if loss.in_pieces:
        encoder, name = kept + transient + gradients, "activations and gradients"
        peak = max(
            kept + gradients + max(transient, loss.backward),
            gradients + max(8.0 * table, update),  # of two pieces, and their sum
            loss.comparing,
        )
    else:
        # When the last layer is recomputed, the gradients of all others are in memory.
        gradients += max(update, layer if checkpointing else 0.0)
        encoder, name = max(kept + transient, gradients), "activations or gradients"
        peak = max(kept + max(transient, loss.comparing, loss.backward), gradients)
    return {
        "weights and optimizer": (6.0 if half else 4.0) * total + 8.0 * (trained + drawn * hidden),
        name: encoder,
        "outputs and scores": loss.outputs + max(0.0, peak - encoder),
        "teacher": 4.0 * total if teacher else 0.0,
        "exchange": 4.0 * trained if ranks > 1 else 0.0,
    }
