"""BGE-M3's three outputs and their scores, as FlagEmbedding computes them.

Chen et al., 2024, arXiv:2402.03216. Dense: pooled hidden state, L2-normalised. Sparse: one
non-negative weight per token id. Multi-vector: one L2-normalised vector per token after CLS.

Training compares texts by their scores (section 3.2 of the paper). None of the scores makes a
tensor of (texts, tokens, vocabulary) or loops over texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.models.losses import widen
from bge_pruning.models.packing import Packing, to_device
from bge_pruning.models.structural_pruning import prune_linear

POOLINGS = ("cls", "mean")


# Products of tokens that exist at once when multi-vectors are compared: 64 MiB in float32.
BLOCK_PRODUCTS = 1 << 24


def compute_colbert_scores(
    query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor
) -> Tensor:
    """Multi-vector score of every query with every passage, shape ``(Q, P)``.

    Mean over the query's tokens of the largest product with a passage token. Products are float32
    or wider, and never more than :data:`BLOCK_PRODUCTS` of them are in memory.

    Args:
        query: Shape ``(Q, Tq, C)``, zero where masked; ``query_mask`` is ``(Q, Tq)``.
        passage: Shape ``(P, Tp, C)``; ``passage_mask`` is ``(P, Tp)``.
    """
    best = _LargestProducts.apply(widen(query), widen(passage), passage_mask.bool())
    weights = query_mask.to(best.dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    return (best * weights[..., None]).sum(1)


class _LargestProducts(torch.autograd.Function):
    """Largest product of each query token with the tokens of each passage, ``(Q, Tq, P)``.

    It is computed in blocks, of which only the maxima and their places are kept. The gradient of a
    product is 0 but at the places, so the backward pass fills each block again from them.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, passage: Tensor, is_open: Tensor) -> Tensor:
        best = query.new_empty(*query.shape[:2], len(passage))
        place = torch.empty_like(best, dtype=torch.int32)
        for rows, columns, size in _blocks(query, passage):
            products = query[rows].flatten(0, 1) @ passage[columns].flatten(0, 1).T
            products.masked_fill_(~is_open[columns].flatten(), torch.finfo(products.dtype).min)
            best[rows, :, columns], place[rows, :, columns] = products.view(size).max(-1)
        ctx.save_for_backward(query, passage, place)
        return best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        query, passage, place = ctx.saved_tensors
        d_query, d_passage = query.new_zeros(query.shape), passage.new_zeros(passage.shape)
        for rows, columns, size in _blocks(query, passage):
            index = place[rows, :, columns, None].long()
            given = gradient[rows, :, columns, None]
            block = gradient.new_zeros(size).scatter_(-1, index, given).flatten(2).flatten(0, 1)
            # Views of the results: a product of its own would be as large as the vectors.
            d_query[rows].flatten(0, 1).addmm_(block, passage[columns].flatten(0, 1))
            d_passage[columns].flatten(0, 1).addmm_(block.T, query[rows].flatten(0, 1))
        return d_query, d_passage, None


def _blocks(query: Tensor, passage: Tensor) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """Queries and passages of each block, and the shape of its products, ``(q, Tq, p, Tp)``."""
    (queries, tokens, _), (passages, width, _) = query.shape, passage.shape
    rows = max(1, min(queries, BLOCK_PRODUCTS // max(1, tokens * width)))
    columns = max(1, min(passages, BLOCK_PRODUCTS // max(1, rows * tokens * width)))
    for row in range(0, queries, rows):
        for column in range(0, passages, columns):
            ends = min(row + rows, queries), min(column + columns, passages)
            size = (ends[0] - row, tokens, ends[1] - column, width)
            yield slice(row, ends[0]), slice(column, ends[1]), size


class EmbeddingHeads(nn.Module):
    """The linear heads on top of the encoder, and the pooling of its states.

    The pooling is ``"cls"`` (BGE-M3) or ``"mean"`` over real tokens. ``colbert_dim`` is the output
    size of the multi-vector head, 0 for none; pruning keeps it.
    """

    def __init__(self, hidden_size: int, pooling: str, sparse: bool, colbert_dim: int) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(
                f"pooling '{pooling}' is not one of {POOLINGS}. To fix, set model.pooling."
            )
        self.pooling = pooling
        self.sparse_linear = nn.Linear(hidden_size, 1) if sparse else None
        self.colbert_linear = nn.Linear(hidden_size, colbert_dim) if colbert_dim else None

    def dense_vecs(
        self, hidden: Tensor, attention_mask: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """Dense vectors, shape ``(B, H)``, L2-normalised."""
        states = hidden if packing is None else packing.unpack(hidden)
        if self.pooling == "cls":
            return _normalize(states[:, 0], hidden.dtype)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return _normalize(mean, hidden.dtype)

    def token_weights(
        self, hidden: Tensor, attention_mask: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """``relu(sparse_linear(h))`` of real tokens, shape ``(B, T)``."""
        weights = torch.relu(self._apply_head("sparse_linear", hidden, packing)).squeeze(-1)
        return weights * attention_mask.to(weights.dtype)

    def colbert_vecs(
        self, hidden: Tensor, attention_mask: Tensor, packing: Packing | None = None
    ) -> Tensor:
        """Multi-vectors of the tokens after CLS, shape ``(B, T - 1, C)``; 0 for padding."""
        vectors = self._apply_head("colbert_linear", hidden, packing)[:, 1:]
        mask = attention_mask[:, 1:, None].to(vectors.dtype)
        return _normalize(vectors * mask, hidden.dtype)

    def linears(self) -> dict[str, nn.Linear]:
        """The heads that the model has, by their output."""
        heads = {"token_weights": self.sparse_linear, "colbert_vecs": self.colbert_linear}
        return {name: head for name, head in heads.items() if head is not None}

    def names(self) -> tuple[str, ...]:
        """The outputs that the model has."""
        return ("dense_vecs", *self.linears())

    def outputs(
        self,
        hidden: Tensor,
        attention_mask: Tensor,
        names: Iterable[str] | None = None,
        packing: Packing | None = None,
    ) -> dict[str, Tensor]:
        """Outputs by name, all of the model's if ``names`` is ``None``.

        Last hidden states are ``(B, T, H)``, or ``(N, H)`` with a ``packing``; the mask ``(B, T)``.

        Raises:
            ValueError: If the model has no head for one of the names.
        """
        wanted = self.names() if names is None else names
        return {name: getattr(self, name)(hidden, attention_mask, packing) for name in wanted}

    def prune(self, hidden: list[int]) -> None:
        """Cut the heads' inputs in place to the kept hidden dimensions."""
        for head in self.linears().values():
            prune_linear(head, hidden, dim=1)

    def _apply_head(self, name: str, hidden: Tensor, packing: Packing | None) -> Tensor:
        """Apply a head to every token; the result has shape ``(B, T, ...)``."""
        head = getattr(self, name)
        if head is None:
            raise ValueError(
                f"the model has no {name.replace('_', ' ')} head. To fix, use a base model with "
                f"{name}.pt, or set model.init_missing_heads=true."
            )
        values = head(hidden)
        return values if packing is None else packing.unpack(values)


def _normalize(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit vectors of a type; a norm of 16 bits would be off by up to 0.4 %, and so each cosine."""
    return F.normalize(widen(vectors), dim=-1).to(dtype)


# The model's names of outputs by the names that losses and modes use.
OUTPUT_NAMES = {"dense": "dense_vecs", "sparse": "token_weights", "colbert": "colbert_vecs"}
# Weights of the outputs in the score that combines them (FlagEmbedding's training).
ENSEMBLE_WEIGHTS = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}


@dataclass(frozen=True)
class Outputs:
    """Outputs of a batch of texts from which scores are computed; ``None`` if not trained.

    Token ids, mask and token weights (non-negative, 0 for padding) are ``(B, T)``. Vectors are
    L2-normalised: dense ``(B, H)``, and of all tokens but CLS ``(B, T - 1, C)``, 0 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dense_vecs: Tensor
    token_weights: Tensor | None = None
    colbert_vecs: Tensor | None = None

    def split(self, size: int) -> list[Outputs]:
        """Groups of so many texts."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        parts = zip(*(value.split(size) for value in given.values()), strict=True)
        return [Outputs(**dict(zip(given, part, strict=True))) for part in parts]


def compute_sparse_scores(
    queries: Outputs, passages: Outputs, special_ids: Iterable[int]
) -> Tensor:
    """Dot product of sparse vectors, ``(Q, P)``: per text the largest weight of each token id.

    The vectors have a column for each token of the queries, ``(texts, Q * Tq)``, which an id's
    first token stands for: other ids add nothing. Special ids carry no weight (cls, eos, pad, unk).
    """
    ids = queries.input_ids.flatten().sort().values
    special = to_device(torch.tensor(sorted(set(special_ids)), dtype=ids.dtype), ids.device)
    count = ids.numel()

    def vectors(texts: Outputs) -> Tensor:
        weights = widen(texts.token_weights)
        given = texts.input_ids.contiguous()
        places = torch.searchsorted(ids, given).clamp(max=count - 1)
        known = (ids[places] == given) & ~torch.isin(given, special)
        empty = weights.new_zeros(len(weights), count)
        return empty.scatter_reduce(1, places, weights * known, "amax", include_self=True)

    return vectors(queries) @ vectors(passages).T


class Scores(NamedTuple):
    """Scores of queries with passages, each ``(Q, P)``: by output, and their weighted sum.

    The names are those of :data:`OUTPUT_NAMES`. Of a single output there is no ensemble.
    """

    outputs: dict[str, Tensor]
    ensemble: Tensor | None

    def all(self) -> dict[str, Tensor]:
        """Scores by name, with the ensemble if there is one."""
        ensemble = {} if self.ensemble is None else {"ensemble": self.ensemble}
        return {**self.outputs, **ensemble}


def compute_scores(queries: Outputs, passages: Outputs, special_ids: Iterable[int]) -> Scores:
    """Scores of all outputs that both sides have, and their weighted sum.

    They are float32 or wider: a temperature multiplies what rounding adds.
    """
    scores = {"dense": widen(queries.dense_vecs) @ widen(passages.dense_vecs).T}  # cosines
    if queries.token_weights is not None and passages.token_weights is not None:
        scores["sparse"] = compute_sparse_scores(queries, passages, special_ids)
    if queries.colbert_vecs is not None and passages.colbert_vecs is not None:
        q, p = ((texts.colbert_vecs, texts.attention_mask[:, 1:]) for texts in (queries, passages))
        scores["colbert"] = compute_colbert_scores(*q, *p)
    weighted = [ENSEMBLE_WEIGHTS[name] * value for name, value in scores.items()]
    return Scores(scores, torch.stack(weighted).sum(0) if len(scores) > 1 else None)
