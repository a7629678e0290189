"""Masks without training: ranks structures by magnitude or activation, and keeps the best.

Exportable shapes are uniform, so heads and intermediate units compete within their layer, and
hidden dimensions and layers with all others of their kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.hard_concrete import top_k
from bge_pruning.models.structural_pruning import SHAPE_FIELDS, PruningMasks


@dataclass(frozen=True)
class Importance:
    """Scores of structures: ``(L, A)``, ``(L, F)``, ``(L,)`` and ``(H,)``; larger is better."""

    head: Tensor
    intermediate: Tensor
    layer: Tensor
    hidden: Tensor


def masks_of_importance(importance: Importance, shape: EncoderShape) -> PruningMasks:
    """Binary gates, on the CPU, of the most important structures; ties go to the lower index."""
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
    """Uniform random scores, whose masks are random sub-networks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = shape.gate_shapes.items()
    return Importance(**{axis: torch.rand(size, generator=generator) for axis, size in sizes})


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


@torch.no_grad()
def activation_importance(
    backbone: XLMRobertaBackbone, batches: Iterable[tuple[Tensor, Tensor]]
) -> Importance:
    """Mean size of activations over all tokens of the texts; the backbone is in evaluation mode.

    * head: mean over tokens of the Euclidean norm of its context vector, of ``D`` numbers;
    * unit: mean over tokens of its absolute value after the activation function;
    * hidden dimension: mean over tokens and over the outputs of all LayerNorms (that of the
      embeddings, two in each layer) of its absolute value;
    * layer: how much it turns the hidden states, ``1 - mean over tokens of cos(input, output)``,
      the block influence of ShortGPT (arXiv:2403.03853).
    """
    sums = _Sums(backbone)
    with ExitStack() as hooks:
        for handle in sums.listen(backbone):
            hooks.enter_context(handle)
        for ids, mask in batches:
            states, _ = backbone.encode(ids, mask, every_layer=True)
            sums.add_states(states)
    return sums.importance()


class _Sums:
    """Sums over tokens, float64, added up by hooks in an encoder."""

    def __init__(self, backbone: XLMRobertaBackbone) -> None:
        device = backbone.embeddings.word_embeddings.weight.device
        self.tokens = 0
        self.head, self.intermediate, self.turn, self.hidden = (
            torch.zeros(size, dtype=torch.float64, device=device)
            for size in backbone.shape.gate_shapes.values()
        )
        self.input: Tensor | None = None

    def listen(self, backbone: XLMRobertaBackbone) -> list[torch.utils.hooks.RemovableHandle]:
        """Add hooks to the modules of an encoder; their tokens are packed, ``(N, ...)``."""
        handles = [backbone.embeddings.register_forward_hook(self._embedded)]
        for index, layer in enumerate(backbone.encoder.layer):
            handles += [
                layer.attention.self.register_forward_hook(partial(self._context, index)),
                layer.attention.output.register_forward_hook(self._normalised),
                layer.intermediate.register_forward_hook(partial(self._units, index)),
                layer.output.register_forward_hook(self._normalised),
            ]
        return handles

    def _embedded(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        self.input = output
        self.tokens += len(output)
        self._normalised(module, given, output)

    def _normalised(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        self.hidden += output.abs().sum(0, dtype=torch.float64)

    def _context(self, index: int, module: nn.Module, given: tuple, output: Tensor) -> None:
        norms = output.unflatten(-1, (-1, module.head_dim)).norm(dim=-1)
        self.head[index] += norms.sum(0, dtype=torch.float64)

    def _units(self, index: int, module: nn.Module, given: tuple, output: Tensor) -> None:
        self.intermediate[index] += output.abs().sum(0, dtype=torch.float64)

    def add_states(self, states: list[Tensor]) -> None:
        """Count how much each layer has turned the hidden states, each ``(N, H)``."""
        for index, (before, after) in enumerate(zip([self.input, *states], states, strict=False)):
            cosines = F.cosine_similarity(before, after, dim=-1)
            self.turn[index] += (1.0 - cosines).sum(dtype=torch.float64)

    def importance(self) -> Importance:
        """The means."""
        if not self.tokens:
            raise ValueError(
                "there is no text to measure activations on. To fix, give at least one with a word."
            )
        norms = 2 * len(self.turn) + 1
        return Importance(
            head=self.head / self.tokens,
            intermediate=self.intermediate / self.tokens,
            layer=self.turn / self.tokens,
            hidden=self.hidden / (self.tokens * norms),
        )
