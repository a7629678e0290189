"""Multi-vector scores of chosen pairs of queries and passages, bounded in memory.

The multi-vectors of a large corpus do not fit in memory: 100,000 passages of 150 tokens in 1,024
dimensions are 60 GB. Here each passage is embedded once, scored against the queries that want it,
and forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bge_pruning.evaluation.text_encoder import TextEncoder

# Pairs whose products of tokens are in memory at once.
PAIRS = 256


@dataclass(frozen=True)
class MultiVectors:
    """Multi-vectors of texts, padded: ``vectors`` ``(n, T, C)``, ``mask`` ``(n, T)``."""

    vectors: Tensor
    mask: Tensor


def encode_queries(encoder: TextEncoder, texts: Sequence[str]) -> MultiVectors:
    """Multi-vectors of all queries, which are few and short.

    Args:
        encoder: The model.
        texts: The queries.
    """
    tokens = encoder.tokenize(texts)
    longest = max(int(tokens.lengths.max(initial=2)) - 1, 1)
    vectors = mask = None
    for index, _, real, outputs in encoder.batches(tokens, ("colbert_vecs",)):
        values = outputs["colbert_vecs"].float()
        if vectors is None:
            vectors = values.new_zeros(len(tokens), longest, values.shape[-1])
            mask = torch.zeros(len(tokens), longest, dtype=torch.bool, device=values.device)
        where = torch.from_numpy(index).to(values.device)
        vectors[where, : values.shape[1]] = values
        mask[where, : values.shape[1]] = real[:, 1:].bool()
    return MultiVectors(vectors, mask)


def score_pairs(
    encoder: TextEncoder,
    queries: MultiVectors,
    passages: Sequence[str],
    pairs: tuple[np.ndarray, np.ndarray],
    progress: bool = False,
) -> np.ndarray:
    """Mean over a query's tokens of the largest product with a passage's tokens.

    Args:
        encoder: The model, which embeds the passages.
        queries: The queries' multi-vectors.
        passages: Texts of the passages.
        pairs: Query and passage of each pair, each of shape ``(n,)``.
        progress: Show a progress bar.

    Returns:
        Scores in the order of the pairs, float32.
    """
    rows, columns = (np.asarray(part, np.int64) for part in pairs)
    wanted, columns = np.unique(columns, return_inverse=True)
    order = np.argsort(columns, kind="stable")
    starts = np.searchsorted(columns[order], np.arange(len(wanted) + 1))
    scores = np.empty(len(rows), np.float32)
    tokens = encoder.tokenize([passages[i] for i in wanted])
    for index, _, mask, outputs in encoder.batches(tokens, ("colbert_vecs",), progress):
        vectors, real = outputs["colbert_vecs"].float(), mask[:, 1:].bool()
        members = [order[starts[i] : starts[i + 1]] for i in index]
        places = np.repeat(np.arange(len(index)), [len(part) for part in members])
        whole = np.concatenate(members)
        for start in range(0, len(whole), PAIRS):
            part = whole[start : start + PAIRS]
            theirs = torch.from_numpy(places[start : start + PAIRS]).to(vectors.device)
            ours = torch.from_numpy(rows[part]).to(vectors.device)
            values = late_interaction(
                queries.vectors[ours], queries.mask[ours], vectors[theirs], real[theirs]
            )
            scores[part] = values.cpu().numpy()
    return scores


def late_interaction(
    queries: Tensor, query_mask: Tensor, passages: Tensor, passage_mask: Tensor
) -> Tensor:
    """Multi-vector scores of query ``i`` with passage ``i``.

    Args:
        queries: Shape ``(n, Tq, C)``.
        query_mask: Shape ``(n, Tq)``.
        passages: Shape ``(n, Tp, C)``.
        passage_mask: Shape ``(n, Tp)``.

    Returns:
        Shape ``(n,)``.
    """
    products = queries @ passages.transpose(1, 2)  # (n, Tq, Tp)
    best = products.masked_fill(~passage_mask[:, None], -torch.inf).amax(-1)
    weights = query_mask.to(best.dtype)
    return (best * weights).sum(-1) / weights.sum(-1)
