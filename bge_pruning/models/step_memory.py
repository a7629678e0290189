"""Memory of a training step, from the sizes alone.

What autograd keeps of a layer for the backward pass, in values a token, follows from
:mod:`bge_pruning.models.bge_m3_backbone`: the input of the projections, both normalised sums and
what lies between the halves (``4 H``), and the layer's output before its gate (``H``); query, key,
value, and the context as it is computed and put together (``5 A D``); the units before and after
the activation (``2 F``). Nothing of it is padding.
"""

from __future__ import annotations

from bge_pruning.models.encoder_shape import EncoderShape, count_parameters

# While the gradient of the last layer's units is made, and while a teacher's layer is computed.
TRANSIENT_UNITS, TEACHER_UNITS = 1.5, 2.0


def step_memory(
    shape: EncoderShape,
    tokens: int,
    gated: bool,
    teacher: bool,
    half: bool = False,
    frozen_embeddings: bool = False,
    checkpointing: bool = False,
) -> dict[str, float]:
    """Peak bytes of tensors in a training step, by part.

    Float32 parts agree with what a step takes to a few percent; with 16-bit autocast the inputs of
    products count half, and a 16-bit copy of every weight is added: 13 % more than what BGE-M3's
    sizes took on a GPU (64 texts of 512 tokens, gates on all axes, compiled LayerNorms).

    Args:
        shape: Sizes of the trained model.
        tokens: Real tokens of a batch.
        gated: Whether there are gates on layers, heads and units.
        teacher: Whether an unpruned model of the same sizes embeds the batch too.
        half: With 16-bit autocast.
        frozen_embeddings: Whether the embeddings have neither gradients nor moments.
        checkpointing: Whether only the inputs of layers are kept for the backward pass.

    Returns:
        ``weights and optimizer`` (AdamW's two moments); ``activations or gradients``, whichever is
        more: the one shrinks in the backward pass as the other grows; ``teacher``.
    """
    hidden, units = shape.hidden_size, shape.intermediate_size
    inner = shape.num_attention_heads * shape.head_dim
    total, item = int(count_parameters(shape).total), 2.0 if half else 4.0
    layer = tokens * (4.0 * hidden * (5 if gated else 4) + item * (5 * inner + 2 * units))
    if gated:  # weights with their columns scaled by the gates
        layer += 4.0 * (units + inner) * hidden
    layers = shape.num_hidden_layers
    kept = layers * 4.0 * hidden * tokens + layer if checkpointing else layers * layer
    activations = kept + tokens * item * TRANSIENT_UNITS * units
    rows = shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size
    trained = total - (rows * hidden if frozen_embeddings else 0)
    # The last layer to be computed again has the gradients of all others beside it.
    gradients = 4.0 * trained + (layer if checkpointing else 0.0)
    return {
        "weights and optimizer": (6.0 if half else 4.0) * total + 8.0 * trained,
        "activations or gradients": max(activations, gradients),
        "teacher": (4.0 * total + item * TEACHER_UNITS * units * tokens) if teacher else 0.0,
    }
