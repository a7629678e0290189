"""Scores of every query with every passage, for the three outputs: pure functions of tensors.

They are what training compares (Chen et al., 2024, arXiv:2402.03216, section 3.2). None of them
makes a tensor of (texts, tokens, vocabulary) or loops over texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bge_pruning.models.device_copy import to_device
from bge_pruning.models.embedding_heads import compute_colbert_scores

# The outputs in the words of losses and modes, and in the model's.
OUTPUT_NAMES = {"dense": "dense_vecs", "sparse": "token_weights", "colbert": "colbert_vecs"}
# Weights of the outputs in the score that combines them (FlagEmbedding's training).
ENSEMBLE_WEIGHTS = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}


@dataclass(frozen=True)
class Outputs:
    """What scores need of a batch of texts; an output that is not trained is ``None``.

    Attributes:
        input_ids: Shape ``(B, T)``.
        attention_mask: Shape ``(B, T)``.
        dense_vecs: L2-normalised, shape ``(B, H)``.
        token_weights: Non-negative, 0 for padding, shape ``(B, T)``.
        colbert_vecs: L2-normalised, 0 for padding, shape ``(B, T - 1, C)``: without CLS.
    """

    input_ids: Tensor
    attention_mask: Tensor
    dense_vecs: Tensor
    token_weights: Tensor | None = None
    colbert_vecs: Tensor | None = None


def compute_dense_scores(queries: Tensor, passages: Tensor) -> Tensor:
    """Cosine similarity of L2-normalised vectors: ``(Q, H)``, ``(P, H)`` to ``(Q, P)``."""
    return queries @ passages.T


def compute_sparse_scores(
    query_ids: Tensor,
    query_weights: Tensor,
    passage_ids: Tensor,
    passage_weights: Tensor,
    special_ids: Iterable[int],
) -> Tensor:
    """Dot product of sparse vectors: per text the largest weight of each token id.

    The vectors are laid out over the ids that occur in the batch, ``(texts, ids)``, not over the
    vocabulary: a GPU is waited for once, to know how many these are.

    Args:
        query_ids: Shape ``(Q, Tq)``.
        query_weights: Non-negative, 0 for padding, shape ``(Q, Tq)``.
        passage_ids: Shape ``(P, Tp)``.
        passage_weights: Same as the queries', shape ``(P, Tp)``.
        special_ids: Ids that carry no weight (cls, eos, pad, unk).

    Returns:
        Scores, shape ``(Q, P)``, differentiable in the weights.
    """
    ids, columns = torch.unique(
        torch.cat([query_ids.flatten(), passage_ids.flatten()]), return_inverse=True
    )
    special = to_device(torch.tensor(sorted(set(special_ids)), dtype=ids.dtype), ids.device)
    lexical = (~torch.isin(ids, special)).to(query_weights.dtype)
    split = query_ids.numel()

    def vectors(weights: Tensor, places: Tensor) -> Tensor:
        empty = weights.new_zeros(weights.shape[0], ids.numel())
        places = places.reshape(weights.shape)
        return empty.scatter_reduce(1, places, weights, "amax", include_self=True)

    queries = vectors(query_weights, columns[:split]) * lexical
    return queries @ vectors(passage_weights, columns[split:]).T


def compute_scores(
    queries: Outputs, passages: Outputs, special_ids: Iterable[int]
) -> dict[str, Tensor]:
    """Scores of all outputs that both sides have, and their weighted sum.

    Args:
        queries: ``Q`` texts.
        passages: ``P`` texts.
        special_ids: See :func:`compute_sparse_scores`.

    Returns:
        ``dense``, ``sparse`` and ``colbert`` as far as they exist, and ``ensemble`` if there is
        more than one; each of shape ``(Q, P)``.
    """
    scores = {"dense": compute_dense_scores(queries.dense_vecs, passages.dense_vecs)}
    if queries.token_weights is not None and passages.token_weights is not None:
        scores["sparse"] = compute_sparse_scores(
            queries.input_ids,
            queries.token_weights,
            passages.input_ids,
            passages.token_weights,
            special_ids,
        )
    if queries.colbert_vecs is not None and passages.colbert_vecs is not None:
        scores["colbert"] = compute_colbert_scores(
            queries.colbert_vecs,
            queries.attention_mask[:, 1:],
            passages.colbert_vecs,
            passages.attention_mask[:, 1:],
        )
    if len(scores) > 1:
        scores["ensemble"] = torch.stack(
            [ENSEMBLE_WEIGHTS[name] * value for name, value in scores.items()]
        ).sum(0)
    return scores
