"""Importance of structures by what they do on real texts (Minitron, arXiv:2407.14679)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.selection.importance import Importance


@torch.no_grad()
def activation_importance(
    backbone: XLMRobertaBackbone, batches: Iterable[tuple[Tensor, Tensor]]
) -> Importance:
    """Mean size of activations over all tokens of the texts.

    * head: mean over tokens of the Euclidean norm of its context vector, of ``D`` numbers;
    * unit: mean over tokens of its absolute value after the activation function;
    * hidden dimension: mean over tokens and over the outputs of all LayerNorms (that of the
      embeddings, two in each layer) of its absolute value;
    * layer: how much it turns the hidden states, ``1 - mean over tokens of cos(input, output)``,
      the block influence of ShortGPT (arXiv:2403.03853).

    Args:
        backbone: The unpruned encoder, in evaluation mode.
        batches: Token ids and mask, shape ``(B, T)``; padding does not count.

    Raises:
        ValueError: If there is no token.
    """
    sums = _Sums(backbone)
    handles = sums.listen(backbone)
    try:
        for ids, mask in batches:
            states, _ = backbone.encode(ids, mask, every_layer=True)
            sums.add_states(states)
    finally:
        for handle in handles:
            handle.remove()
    return sums.importance()


class _Sums:
    """Sums over tokens, float64, filled by what passes through an encoder."""

    def __init__(self, backbone: XLMRobertaBackbone) -> None:
        s = backbone.shape
        device = backbone.embeddings.word_embeddings.weight.device
        options = {"dtype": torch.float64, "device": device}
        self.tokens = 0
        self.head = torch.zeros(s.num_hidden_layers, s.num_attention_heads, **options)
        self.intermediate = torch.zeros(s.num_hidden_layers, s.intermediate_size, **options)
        self.turn = torch.zeros(s.num_hidden_layers, **options)
        self.hidden = torch.zeros(s.hidden_size, **options)
        self.input: Tensor | None = None

    def listen(self, backbone: XLMRobertaBackbone) -> list[torch.utils.hooks.RemovableHandle]:
        """Have the modules of an encoder tell what they give; tokens are packed, ``(N, ...)``."""
        handles = [backbone.embeddings.register_forward_hook(self._embedded)]
        for index, layer in enumerate(backbone.encoder.layer):
            attention = layer.attention
            handles += [
                attention.self.register_forward_hook(self._context(index, attention.self.head_dim)),
                attention.output.register_forward_hook(self._normalised),
                layer.intermediate.register_forward_hook(self._units(index)),
                layer.output.register_forward_hook(self._normalised),
            ]
        return handles

    def _embedded(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        self.input = output
        self.tokens += len(output)
        self._normalised(module, given, output)

    def _normalised(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        self.hidden += output.abs().sum(0, dtype=torch.float64)

    def _context(self, index: int, head_dim: int):  # noqa: ANN202  (a hook)
        def add(module: nn.Module, given: tuple, output: Tensor) -> None:
            norms = output.unflatten(-1, (-1, head_dim)).norm(dim=-1)
            self.head[index] += norms.sum(0, dtype=torch.float64)

        return add

    def _units(self, index: int):  # noqa: ANN202  (a hook)
        def add(module: nn.Module, given: tuple, output: Tensor) -> None:
            self.intermediate[index] += output.abs().sum(0, dtype=torch.float64)

        return add

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
