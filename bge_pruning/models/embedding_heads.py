"""BGE-M3's three outputs and their scores, as FlagEmbedding computes them.

Chen et al., 2024, arXiv:2402.03216. Dense: pooled hidden state, L2-normalised. Sparse: one
non-negative weight per token id. Multi-vector: one L2-normalised vector per token after CLS.

Training compares texts by their scores (section 3.2 of the paper). None of the scores makes a
tensor of (texts, tokens, vocabulary) or loops over texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.models.packing import Packing, to_device
from bge_pruning.models.structural_pruning import prune_linear

POOLINGS = ("cls", "mean")


def compute_colbert_scores(
    query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor
) -> Tensor:
    """Multi-vector score of every query with every passage, shape ``(Q, P)``.

    Mean over the query's tokens of the largest product with a passage token.

    Args:
        query: Shape ``(Q, Tq, C)``, zero where masked; ``query_mask`` is ``(Q, Tq)``.
        passage: Shape ``(P, Tp, C)``; ``passage_mask`` is ``(P, Tp)``.
    """
    products = torch.einsum("qic,pjc->qpij", query, passage)
    closed = ~passage_mask.bool()[None, :, None, :]
    best = products.masked_fill(closed, torch.finfo(products.dtype).min).amax(-1)  # (Q, P, Tq)
    weights = query_mask.to(best.dtype)
    return (best * weights[:, None]).sum(-1) / weights.sum(-1)[:, None]


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
            return F.normalize(states[:, 0], dim=-1)
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)

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
        return F.normalize(vectors * mask, dim=-1)

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


def compute_sparse_scores(
    queries: Outputs, passages: Outputs, special_ids: Iterable[int]
) -> Tensor:
    """Dot product of sparse vectors, ``(Q, P)``: per text the largest weight of each token id.

    The vectors span the ids that occur in the batch, ``(texts, ids)``, not the vocabulary; the host
    waits for a GPU once, to know their number. Special ids carry no weight (cls, eos, pad, unk).
    """
    every = torch.cat([queries.input_ids.flatten(), passages.input_ids.flatten()])
    ids, columns = torch.unique(every, return_inverse=True)
    special = to_device(torch.tensor(sorted(set(special_ids)), dtype=ids.dtype), ids.device)
    lexical = (~torch.isin(ids, special)).to(queries.token_weights.dtype)
    split = queries.input_ids.numel()

    def vectors(weights: Tensor, places: Tensor) -> Tensor:
        empty = weights.new_zeros(weights.shape[0], ids.numel())
        places = places.reshape(weights.shape)
        return empty.scatter_reduce(1, places, weights, "amax", include_self=True)

    left = vectors(queries.token_weights, columns[:split]) * lexical
    return left @ vectors(passages.token_weights, columns[split:]).T


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
    """Scores of all outputs that both sides have, and their weighted sum."""
    scores = {"dense": queries.dense_vecs @ passages.dense_vecs.T}  # cosines
    if queries.token_weights is not None and passages.token_weights is not None:
        scores["sparse"] = compute_sparse_scores(queries, passages, special_ids)
    if queries.colbert_vecs is not None and passages.colbert_vecs is not None:
        q, p = ((texts.colbert_vecs, texts.attention_mask[:, 1:]) for texts in (queries, passages))
        scores["colbert"] = compute_colbert_scores(*q, *p)
    weighted = [ENSEMBLE_WEIGHTS[name] * value for name, value in scores.items()]
    return Scores(scores, torch.stack(weighted).sum(0) if len(scores) > 1 else None)
