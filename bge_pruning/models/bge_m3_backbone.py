"""XLM-RoBERTa encoder with gates, with Hugging Face's parameter names.

XLM-R is post-LayerNorm: ``h = LN(x + Attn(x))``, ``y = LN(h + FFN(h))``. A closed layer gate must
make the layer the identity (its two LayerNorms included), and a LayerNorm must take its statistics
over the open hidden dimensions only. Both hold here, so a model masked with binary gates computes
what the model cut by :meth:`XLMRobertaBackbone.prune` computes.

With all gates open (or none given) it equals ``transformers.XLMRobertaModel``, and state dicts are
exchanged with ``strict=True`` both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bge_pruning.models.encoder_shape import EncoderShape, ParameterCount
from bge_pruning.models.layer_norm import residual_norm
from bge_pruning.models.packing import (
    Packing,
    attend,
    compute_packing,
    keep_padding,
    varlen_applies,
)
from bge_pruning.models.structural_pruning import (
    KeepIndices,
    PruningMasks,
    compute_keep_indices,
    head_rows,
    prune_embedding,
    prune_layer_norm,
    prune_linear,
)
from bge_pruning.utils.environment import allow_compiled_forms


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    def __init__(self, shape: EncoderShape, pad_token_id: int, eps: float, dropout: float) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.pad_token_id = pad_token_id
        self.word_embeddings = nn.Embedding(shape.vocab_size, hidden, padding_idx=pad_token_id)
        self.position_embeddings = nn.Embedding(
            shape.max_position_embeddings, hidden, padding_idx=pad_token_id
        )
        self.token_type_embeddings = nn.Embedding(shape.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def tables(self) -> tuple[nn.Embedding, ...]:
        """Word, position and token-type embeddings."""
        return self.word_embeddings, self.position_embeddings, self.token_type_embeddings

    def freeze_tables(self) -> None:
        """Stop training the embeddings; they need neither gradients nor an optimizer's state."""
        for table in self.tables():
            table.requires_grad_(False)

    def share_tables(self, others: Embeddings) -> None:
        """Take over the memory of another model's frozen embeddings, where they are the same."""
        for table, other in zip(self.tables(), others.tables(), strict=True):
            if torch.equal(table.weight, other.weight):
                table.weight = other.weight

    def forward(self, input_ids: Tensor, packing: Packing, hidden_z: Tensor | None) -> Tensor:
        """Embed ``input_ids`` of shape ``(B, T)`` as packed tokens ``(N, H)``."""
        # Positions count real tokens from pad_token_id + 1; padding stays at pad_token_id.
        real = input_ids.ne(self.pad_token_id).long()
        positions = real.cumsum(dim=1) * real + self.pad_token_id
        words = self.word_embeddings(packing.pack(input_ids)) + self.token_type_embeddings.weight[0]
        u = residual_norm(
            self.position_embeddings(packing.pack(positions)), words, self.LayerNorm, hidden_z
        )
        return self.dropout(u)


class SelfAttention(nn.Module):
    """Query, key and value projections and scaled dot-product attention of the kept heads."""

    def __init__(self, shape: EncoderShape, dropout: float) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.dropout_p = dropout
        inner = shape.num_attention_heads * shape.head_dim
        self.query = nn.Linear(shape.hidden_size, inner)
        self.key = nn.Linear(shape.hidden_size, inner)
        self.value = nn.Linear(shape.hidden_size, inner)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """Attend; ``x`` is ``(N, H)``, the result ``(N, A * D)``."""
        if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not for each projection
        split = (-1, self.head_dim)
        parts = [f(x).unflatten(-1, split) for f in (self.query, self.key, self.value)]
        dropout_p = self.dropout_p if self.training else 0.0
        return attend(*parts, packing, dropout_p).flatten(1)


class ResidualOutput(nn.Module):
    """Projection back to the hidden size, residual connection and LayerNorm."""

    def __init__(self, inner: int, hidden: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        inner: Tensor,
        residual: Tensor,
        inner_z: Tensor | None,
        hidden_z: Tensor | None,
        skip: Tensor | None = None,
        layer_z: Tensor | None = None,
    ) -> Tensor:
        """``LN(residual + dense(inner * inner_z))``, shape ``(N, H)``, see :func:`residual_norm`.

        The gates of heads or units scale the columns of the weight: it is smaller than the batch,
        which would have to be kept a second time for the gradient.
        """
        weight = self.dense.weight if inner_z is None else self.dense.weight * inner_z
        y = F.linear(inner, weight, self.dense.bias)
        return residual_norm(self.dropout(y), residual, self.LayerNorm, hidden_z, skip, layer_z)


class Attention(nn.Module):
    """The attention half of a layer."""

    def __init__(self, shape: EncoderShape, eps: float, dropout: float) -> None:
        super().__init__()
        inner = shape.num_attention_heads * shape.head_dim
        self.self = SelfAttention(shape, dropout)
        self.output = ResidualOutput(inner, shape.hidden_size, eps, dropout)


class Intermediate(nn.Module):
    """The widening projection of the feed-forward half; the activation is exact GELU."""

    def __init__(self, hidden: int, units: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, units)

    def forward(self, x: Tensor) -> Tensor:
        """``gelu(dense(x))``, shape ``(N, F)``."""
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """One post-LayerNorm transformer layer."""

    def __init__(self, shape: EncoderShape, eps: float, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(shape, eps, dropout)
        self.intermediate = Intermediate(shape.hidden_size, shape.intermediate_size)
        self.output = ResidualOutput(shape.intermediate_size, shape.hidden_size, eps, dropout)

    def forward(self, x: Tensor, packing: Packing, masks: PruningMasks) -> Tensor:
        """``x <- layer_z * y + (1 - layer_z) * x``, ``(N, H)``; a closed layer is the identity."""
        context = self.attention.self(x, packing)
        h = self.attention.output(context, x, masks.head, masks.hidden)
        units = self.intermediate(h)
        return self.output(units, h, masks.intermediate, masks.hidden, x, masks.layer)

    def prune(self, heads: list[int], units: list[int], hidden: list[int]) -> None:
        """Cut the layer in place to the given structures."""
        inner = self.attention.self
        rows = head_rows(heads, inner.head_dim)
        for projection in (inner.query, inner.key, inner.value):
            prune_linear(projection, rows, dim=0)
            prune_linear(projection, hidden, dim=1)
        prune_linear(self.intermediate.dense, units, dim=0)
        prune_linear(self.intermediate.dense, hidden, dim=1)
        for output, inputs in ((self.attention.output, rows), (self.output, units)):
            prune_linear(output.dense, inputs, dim=1)
            prune_linear(output.dense, hidden, dim=0)
            prune_layer_norm(output.LayerNorm, hidden)


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, shape: EncoderShape, eps: float, dropout: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(shape, eps, dropout) for _ in range(shape.num_hidden_layers)
        )


class Pooler(nn.Module):
    """XLM-R's pooler. BGE-M3 does not use it; it is kept so that state dicts stay complete."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden, hidden)


class XLMRobertaBackbone(nn.Module):
    """XLM-R encoder that can be masked by gates and cut to them.

    Args:
        pad_token_id: Id of the padding token; positions are numbered from it.
        dropout: Probability of dropping hidden states and attention weights in training.

    Attributes:
        compiled_for: True if layers run compiled in training, False if in evaluation, ``None`` if
            in neither.
        activation_checkpointing: Keep only the input of each layer for the backward pass, which
            computes the layers again.
    """

    def __init__(
        self,
        shape: EncoderShape,
        pad_token_id: int = 1,
        layer_norm_eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        self.compiled_for: bool | None = None
        self._compiled_layer: Callable[..., Tensor] = Layer.__call__  # until it is compiled
        self.activation_checkpointing = False
        self.embeddings = Embeddings(shape, pad_token_id, layer_norm_eps, dropout)
        self.encoder = Encoder(shape, layer_norm_eps, dropout)
        if shape.pooler:
            self.pooler = Pooler(shape.hidden_size)
            # No output uses the pooler: without this, DDP would wait for its gradients.
            self.pooler.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        masks: PruningMasks | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Hidden states of the last layer, ``(B, T, H)``; 0 for padding and in closed dimensions.

        Token ids and mask, which is 1 for real tokens, are ``(B, T)``. Without masks the model is
        whole; for ``lengths`` see :func:`compute_packing`.
        """
        states, packing = self.encode(input_ids, attention_mask, masks, lengths)
        return packing.unpack(states[-1])

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        masks: PruningMasks | None = None,
        lengths: Sequence[int] | None = None,
        every_layer: bool = False,
    ) -> tuple[list[Tensor], Packing]:
        """Hidden states of packed tokens, ``(N, H)`` each, and their places, see :meth:`forward`.

        With ``every_layer`` there are the states after every layer, otherwise after the last one; a
        closed layer repeats those before it.
        """
        masks = PruningMasks() if masks is None else masks
        packing = self._pack(attention_mask, lengths)
        x = self.embeddings(input_ids, packing, masks.hidden)
        layers, states = self.encoder.layer, []
        gates = masks.of_layers(len(layers), self.shape.head_dim)
        for layer, layer_gates in zip(layers, gates, strict=True):
            given = (layer, x, packing, layer_gates)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Without dropout nothing random is recomputed, so no random state has to be kept.
                options = {"use_reentrant": False, "preserve_rng_state": self.dropout > 0}
                x = checkpoint(self._run_layer, *given, **options)
            else:
                x = self._run_layer(*given)
            states = [*states, x] if every_layer else [x]
        return states, packing

    def _run_layer(self, layer: Layer, *given: Tensor | Packing | PruningMasks) -> Tensor:
        return self._compiled_layer(layer, *given) if self.compiled else layer(*given)

    def _pack(self, attention_mask: Tensor, lengths: Sequence[int] | None) -> Packing:
        weight = self.embeddings.word_embeddings.weight
        drops = self.training and self.dropout > 0  # not supported by the kernel for any lengths
        varlen = varlen_applies(weight.device, weight.dtype, self.shape.head_dim) and not drops
        if self.compiled and not varlen:
            return keep_padding(attention_mask)
        return compute_packing(attention_mask, lengths, varlen)

    @property
    def compiled(self) -> bool:
        """Whether layers run compiled in the present mode."""
        return self.training == self.compiled_for

    def compile_encoder(self, training: bool, backend: str | Callable = "inductor") -> None:
        """Compile a layer as one graph, which all layers share, for training or for evaluation.

        A graph is made for the first size of batch, and a second one for any size. Its shapes
        follow from that of the batch, so padding is computed too, except where there is a kernel
        for texts of any lengths (see :func:`bge_pruning.models.packing.varlen_applies`).
        """
        allow_compiled_forms()
        self.compiled_for = training
        self._compiled_layer = torch.compile(Layer.forward, backend=backend)

    def keep_indices(self, masks: PruningMasks) -> KeepIndices:
        """Indices that binary gates keep of this model."""
        return compute_keep_indices(masks, self.shape)

    def prune(self, keep: KeepIndices) -> None:
        """Cut the model in place. Every kept weight keeps its value bit for bit.

        Layers may end with different numbers of heads and units (``shape`` then no longer
        describes the model); only uniform models can be exported.
        """
        for table in self.embeddings.tables():
            prune_embedding(table, keep.hidden)
        prune_layer_norm(self.embeddings.LayerNorm, keep.hidden)
        self.encoder.layer = nn.ModuleList(self.encoder.layer[i] for i in keep.layer)
        kept = zip(self.encoder.layer, keep.head, keep.intermediate, strict=True)
        for layer, heads, units in kept:
            layer.prune(heads, units, keep.hidden)
        if self.shape.pooler:
            prune_linear(self.pooler.dense, keep.hidden, dim=0)
            prune_linear(self.pooler.dense, keep.hidden, dim=1)

    def count_parameters(self) -> ParameterCount:
        """Count the parameters that the modules really hold (0 heads: another module has them)."""

        def count(module: nn.Module) -> int:
            return sum(p.numel() for p in module.parameters())

        pooler = count(self.pooler) if self.shape.pooler else 0
        return ParameterCount(count(self.encoder), count(self.embeddings), pooler, 0)
