"""Multi-vector scores of chosen pairs of queries and passages, bounded in memory.

The multi-vectors of a large corpus do not fit in memory: 100,000 passages of 150 tokens in 1,024
dimensions are 60 GB. Here each passage is embedded once, scored against its queries, and dropped,
unless the multi-vectors of all passages have been computed already.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from bge_pruning.evaluation.text_encoder import BatchEncoder, MultiVectors

# Products of tokens that are in memory at once.
PRODUCTS = 1 << 24


def encode_queries(encoder: BatchEncoder, texts: Sequence[str]) -> MultiVectors:
    """Multi-vectors of all queries, which are few and short."""
    ranks = encoder.ranks
    part = _encode(encoder, ranks.share(texts))
    if ranks.count == 1:
        return part
    bounds = pairwise(part.starts.tolist())
    parts = ranks.gather([part.vectors[start:end].cpu().numpy() for start, end in bounds])
    found = [block for blocks in parts for block in blocks]
    blocks = [found[place] for place in ranks.order(len(texts))]
    starts = np.cumsum([0, *map(len, blocks)])
    return MultiVectors(torch.from_numpy(np.concatenate(blocks)).to(encoder.device), starts)


def _encode(encoder: BatchEncoder, texts: Sequence[str]) -> MultiVectors:
    tokens = encoder.tokenize(texts)
    found = MultiVectors.room_for(tokens)
    for index, _, _, outputs in encoder.batches(tokens, ("colbert_vecs",)):
        found.fill(index, outputs["colbert_vecs"].float())
    return found


def score_pairs(
    encoder: BatchEncoder,
    queries: MultiVectors,
    passages: Sequence[str],
    pairs: tuple[np.ndarray, np.ndarray],
    progress: bool = False,
    ready: MultiVectors | None = None,
) -> np.ndarray:
    """Mean over a query's tokens of the largest product with a passage's tokens, in float32.

    Pairs are numbers of queries and of passages, each ``(n,)``. Multi-vectors of the passages may
    be ``ready``, in one process only.
    """
    if ready is not None:
        return _score_ready(queries, ready, pairs)
    ranks = encoder.ranks
    rows, columns = (np.asarray(part, np.int64) for part in pairs)
    wanted, columns = np.unique(columns, return_inverse=True)
    scores = np.zeros(len(rows), np.float32)
    mine = np.flatnonzero(columns % ranks.count == ranks.rank)
    own = [passages[index] for index in ranks.share(wanted)]
    scores[mine] = _score(
        encoder, queries, own, (rows[mine], columns[mine] // ranks.count), progress
    )
    # Each pair is scored by one process, and is 0 in the others.
    return scores if ranks.count == 1 else np.sum(ranks.gather(scores), axis=0)


def _score(
    encoder: BatchEncoder,
    queries: MultiVectors,
    passages: Sequence[str],
    pairs: tuple[np.ndarray, np.ndarray],
    progress: bool,
) -> np.ndarray:
    rows, columns = pairs
    order = np.argsort(columns, kind="stable")
    starts = np.searchsorted(columns[order], np.arange(len(passages) + 1))
    scores = np.empty(len(rows), np.float32)
    tokens = encoder.tokenize(passages)
    for index, _, _, outputs in encoder.batches(tokens, ("colbert_vecs",), progress):
        vectors = outputs["colbert_vecs"].float()
        for row, passage in enumerate(index):
            length = int(tokens.lengths[passage]) - 1
            members = order[starts[passage] : starts[passage + 1]]
            scores[members] = score_passage(queries, rows[members], vectors[row, :length])
    return scores


def _score_ready(
    queries: MultiVectors, passages: MultiVectors, pairs: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    rows, columns = (np.asarray(part, np.int64) for part in pairs)
    order = np.argsort(columns, kind="stable")
    wanted, starts = np.unique(columns[order], return_index=True)
    scores = np.empty(len(rows), np.float32)
    for passage, members in zip(wanted, np.split(order, starts[1:]), strict=True):
        vectors = passages.vectors[passages.starts[passage] : passages.starts[passage + 1]]
        scores[members] = score_passage(queries, rows[members], vectors)
    return scores


def score_passage(queries: MultiVectors, chosen: np.ndarray, passage: Tensor) -> np.ndarray:
    """Multi-vector scores of the chosen queries, ``(n,)``, with one passage, ``(T, C)``.

    The tokens of all chosen queries are gathered one query after the other, so that their products
    with the passage are one matrix product; one for each pair would be small, and slow.
    """
    starts = queries.starts[chosen]
    counts = queries.starts[chosen + 1] - starts
    scores = np.empty(len(chosen), np.float32)
    # Queries whose products with this passage fit in memory together.
    groups = np.cumsum(counts) * len(passage) // PRODUCTS
    for group in np.unique(groups):
        part = groups == group
        rows, firsts = _ragged_rows(starts[part], counts[part])
        vectors = queries.vectors[torch.from_numpy(rows).to(passage.device)]
        best = (vectors @ passage.T).amax(1).cpu().numpy()
        scores[part] = np.add.reduceat(best, firsts) / counts[part]
    return scores


def _ragged_rows(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of several runs, one run after the other, and where each run begins among them.

    Starts 10 and 40 with counts 2 and 3 give the rows 10, 11, 40, 41, 42, which begin at 0 and 2.
    """
    firsts = np.cumsum(counts) - counts
    return np.repeat(starts - firsts, counts) + np.arange(counts.sum()), firsts
