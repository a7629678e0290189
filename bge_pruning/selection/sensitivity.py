"""What the outputs of a model feel of its sublayers, by a backward pass of random projections.

With ``g_t`` the gradient of a random projection of the outputs with respect to what token ``t``
gets from a sublayer, an error ``e_t`` moves the outputs by ``E[(g_t . e_t)^2]`` on average. For a
fit, a token has, among the ``T`` tokens of its text, the weight

``w_t = (1 - a) / T + a |g_t|^2 / sum |g|^2``, at most ``10 / T``.

The first part holds on to all tokens, since the gradient tells of small errors alone. The second
finds the tokens that matter: where dense vectors are the state of the first token, that is one of
``T``. All texts weigh about the same, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bge_pruning.models.bge_m3_backbone import ResidualOutput, XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.packing import Packing, compute_packing
from bge_pruning.models.teacher import compute_outputs

# Tokens that are carried through the backward pass at once, padding included.
PIECE_TOKENS = 4096
# Smallest norm of a text's token weights by which they are divided.
SMALLEST = 0.1
# Share of a text's weight that goes by the gradient, and the largest weight in times of the mean.
FELT_SHARE = 0.5
LARGEST = 10.0

# Gets a sublayer's inputs, (N, I), the gradients, (N, H), and the places of packed tokens.
Hear = Callable[[Tensor, Tensor, Packing], None]


@dataclass(frozen=True)
class WeighedTexts:
    """Ids and mask, ``(B, T)``, and weights of packed tokens, ``(N,)``, by sublayer."""

    ids: Tensor
    mask: Tensor
    weights: dict[ResidualOutput, Tensor]


def weigh_tokens(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    batches: Sequence[tuple[Tensor, Tensor]],
    seed: int = 0,
) -> list[WeighedTexts]:
    """Texts, as :func:`probe` splits them, with the weights of their tokens."""
    outputs = [o for x in backbone.encoder.layer for o in (x.attention.output, x.output)]
    heard: dict[ResidualOutput, list[Tensor]] = {output: [] for output in outputs}

    def listen(output: ResidualOutput) -> Hear:
        return lambda x, g, packing: heard[output].append(token_weights(g, packing))

    hear = {output: listen(output) for output in outputs}
    pieces = probe(backbone, heads, batches, hear, seed)
    weights = [{o: found[index] for o, found in heard.items()} for index in range(len(pieces))]
    return [WeighedTexts(*piece, w) for piece, w in zip(pieces, weights, strict=True)]


@torch.enable_grad()
def probe(
    backbone: XLMRobertaBackbone,
    heads: EmbeddingHeads,
    batches: Sequence[tuple[Tensor, Tensor]],
    hear: Mapping[ResidualOutput, Hear],
    seed: int,
) -> list[tuple[Tensor, Tensor]]:
    """Carry random projections of the outputs of all texts back through the encoder.

    Both are in evaluation mode. What adds to the stream has the gradient of the stream.

    Args:
        batches: Token ids and mask, shape ``(B, T)``; padding does not count.
        hear: What is told of a sublayer, by its output projection, piece by piece.
        seed: Of the projections.

    Returns:
        Ids and masks of the pieces in which the batches were carried.
    """
    pieces: list[tuple[Tensor, Tensor]] = []
    for ids, mask in batches:
        rows = max(1, PIECE_TOKENS // ids.shape[1])
        pieces += zip(ids.split(rows), mask.split(rows), strict=True)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: every device draws the same
    names = heads.names()
    with gradients_of_stream_only(backbone, heads):
        for ids, mask in pieces:
            packing = compute_packing(mask)
            with ExitStack() as hooks:
                for output, tell in hear.items():
                    hook = _listener(tell, packing)
                    hooks.enter_context(output.register_forward_pre_hook(hook))
                outputs = compute_outputs(backbone, heads, ids, mask, names)
            sum(_project(n, outputs[n], mask, generator) for n in names).backward()
    return pieces


def _listener(tell: Hear, packing: Packing) -> Callable[[nn.Module, tuple], tuple]:
    def listen(module: nn.Module, given: tuple) -> tuple:
        inputs, residual, *rest = given
        inner = inputs.detach()
        stream = residual * 1.0  # a tensor of its own: the residual has other uses

        def heard(gradient: Tensor) -> None:
            tell(inner, gradient.detach().double(), packing)

        stream.register_hook(heard)
        return (inputs, stream, *rest)

    return listen


def token_weights(gradients: Tensor, packing: Packing) -> Tensor:
    """Weights of packed tokens, ``(N,)``, from their gradients, ``(N, H)``; see the module."""
    parts, felt = [], gradients.square().sum(1)
    for squares, size in zip(felt.split(packing.group_tokens), packing.groups, strict=True):
        rows, length = squares.unflatten(0, size), size[1]
        total = rows.sum(1, keepdim=True).clamp(min=torch.finfo(felt.dtype).tiny)
        weights = (1.0 - FELT_SHARE) / length + FELT_SHARE * rows / total
        parts.append(weights.clamp(max=LARGEST / length).flatten())
    return torch.cat(parts).float()


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
