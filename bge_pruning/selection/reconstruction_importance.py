"""Importance of heads and units by how well the others could make up for them.

Without the group ``g`` of its inputs, an output projection ``W`` that is fitted again loses

``tr(W_g^T [(X^T X)^-1]_gg^-1 W_g)``

(the optimal brain surgeon, see :mod:`bge_pruning.selection.least_squares`). Not every error counts
alike. With ``g_t`` the gradient of a random projection of the model's outputs with respect to what
token ``t`` gets from the sublayer, an error ``e_t`` moves the outputs by ``E[(g_t . e_t)^2]`` on
average. As in K-FAC (Martens and Grosse, arXiv:1503.05671) tokens and dimensions are taken apart:
``X^T X`` becomes ``sum_t |g_t|^2 x_t x_t^T``, and the columns of ``W`` are measured by
``G = sum_t g_t g_t^T``: ``W`` becomes ``W G^(1/2)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from bge_pruning.models.bge_m3_backbone import ResidualOutput, XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.teacher import compute_outputs
from bge_pruning.selection.importance import Importance, activation_importance
from bge_pruning.selection.least_squares import elimination_order, joined

# Tokens that are carried through the backward pass at once, padding included.
PIECE_TOKENS = 4096
# Smallest norm of a text's token weights by which they are divided.
SMALLEST = 0.1


def reconstruction_importance(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    batches: Iterable[tuple[Tensor, Tensor]],
    seed: int = 0,
) -> Importance:
    """Heads and units in the order in which the model's outputs can best do without them.

    Those go first without which the output projection, fitted again to the ones that are left,
    comes nearest to what it gave (see :func:`elimination_order`): of two that say the same, one is
    not needed. An error counts by what it does to the outputs of its text, to first order. Their
    scores are places in the order, from 0 for the first to go. Hidden dimensions and layers are
    scored as by :func:`activation_importance`.

    Args:
        backbone: The unpruned encoder, in evaluation mode, as its heads.
        batches: Token ids and mask, shape ``(B, T)``; padding does not count.
        seed: Of the directions in which the outputs are probed.
    """
    batches = list(batches)
    measured = activation_importance(backbone, batches)
    outputs = [(layer.attention.output, layer.output) for layer in backbone.encoder.layer]
    sublayers = {output: _Sublayer(output) for pair in outputs for output in pair}
    _probe(backbone, heads, batches, list(sublayers.values()), seed)
    head_dim = backbone.shape.head_dim
    return replace(
        measured,
        head=torch.stack([sublayers[attention].places(head_dim) for attention, _ in outputs]),
        intermediate=torch.stack([sublayers[units].places(1) for _, units in outputs]),
    )


class _Sublayer:
    """Inputs of an output projection, ``xx``, and gradients of what it gives, ``gg``.

    Both are sums over tokens, see the module's equation.
    """

    def __init__(self, output: ResidualOutput) -> None:
        self.output = output
        weight = output.dense.weight
        options = {"dtype": torch.float64, "device": weight.device}
        self.xx = torch.zeros(weight.shape[1] + 1, weight.shape[1] + 1, **options)
        self.gg = torch.zeros(weight.shape[0], weight.shape[0], **options)

    def listen(self, module: nn.Module, given: tuple) -> tuple:
        """Forward pre-hook: what is added to the stream has the gradient of the stream."""
        inputs, residual, *rest = given
        x = torch.cat([inputs.detach(), inputs.new_ones(len(inputs), 1)], dim=1)
        stream = residual * 1.0  # a tensor of its own: the residual has other uses

        def add(gradient: Tensor) -> None:
            g = gradient.detach().double()
            weighted = x * g.norm(dim=1, keepdim=True)
            self.xx += weighted.T @ weighted
            self.gg += g.T @ g

        stream.register_hook(add)
        return (inputs, stream, *rest)

    @torch.no_grad()
    def places(self, group: int) -> Tensor:
        """Place of each group of inputs in the order of elimination, shape ``(groups,)``."""
        values, vectors = torch.linalg.eigh(self.gg)
        felt = joined(self.output.dense) @ (vectors * values.clamp(min=0).sqrt())
        return elimination_order(self.xx, felt, group).argsort().double()


def _probe(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    batches: Iterable[tuple[Tensor, Tensor]],
    sublayers: list[_Sublayer],
    seed: int,
) -> None:
    """Carry random projections of the outputs of all texts back through the encoder."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: every device draws the same
    names = heads.names()
    with gradients_of_stream_only(backbone, heads), ExitStack() as hooks:
        for sublayer in sublayers:
            hooks.enter_context(sublayer.output.register_forward_pre_hook(sublayer.listen))
        for ids, mask in batches:
            rows = max(1, PIECE_TOKENS // ids.shape[1])
            for piece, real in zip(ids.split(rows), mask.split(rows), strict=True):
                outputs = compute_outputs(backbone, heads, piece, real, names)
                sum(_project(n, outputs[n], real, generator) for n in names).backward()


@contextmanager
def gradients_of_stream_only(backbone: XLMRobertaBackbone, heads: EmbeddingHeads) -> Iterator[None]:
    """Let backward passes reach the hidden states from the embeddings on, but no weight."""
    trained = [p for m in (backbone, heads) for p in m.parameters() if p.requires_grad]

    def begin(module: nn.Module, given: tuple, states: Tensor) -> Tensor:
        return states.requires_grad_()

    with backbone.embeddings.register_forward_hook(begin):
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def _project(name: str, vectors: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """A random projection of an output, which counts as one vector of length 1 for each text.

    Dense vectors are ``(B, H)``, multi-vectors of all tokens but the first ``(B, T - 1, H)``, token
    weights ``(B, T)``; the mask ``(B, T)`` is 1 for real tokens.
    """
    directions = torch.randn(vectors.shape, generator=generator).to(vectors)
    products = vectors * directions
    if name == "colbert_vecs":
        real = mask[:, 1:].to(products)
        products = products.sum(-1) * real / real.sum(1, keepdim=True).clamp(min=1).sqrt()
    elif name == "token_weights":
        real = mask.to(products)
        size = (vectors.detach() * real).norm(dim=1, keepdim=True)
        products = products * real / size.clamp(min=SMALLEST)
    return products.sum()
