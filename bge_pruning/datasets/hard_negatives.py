"""Hard negatives: passages that a model finds close to a query and that are no known positives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.datasets.rows import RowTable
from bge_pruning.datasets.teacher_vectors import load_array, save_array

# Rows of scores that are in memory at once, and their columns.
QUERIES, PASSAGES = 256, 65_536
# Raised when other negatives would be mined from the same vectors.
FORMAT = 1


def mine_negatives(
    queries: np.ndarray,
    passages: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    count: int,
    margin: float,
) -> np.ndarray:
    """The passages most similar to each query that are no known positives of it.

    A passage that scores above ``margin`` times the query's lowest-scoring known positive is left
    out too: it probably is a positive that nobody labelled (NV-Retriever, arXiv:2407.15831). Where
    that positive scores 0 or less, nothing is.

    Args:
        queries: L2-normalised vectors, shape ``(q, H)``.
        passages: L2-normalised vectors, shape ``(p, H)``.
        known: Indices of positives of all queries, and where those of each query begin and end in
            them, shape ``(q, 2)``.
        count: Negatives per query.
        margin: In (0, 1].

    Returns:
        Indices of passages, most similar first, shape ``(q, count)``; -1 where there are fewer.
    """
    found = np.full((len(queries), count), -1, np.int64)
    for start in range(0, len(queries), QUERIES):
        part = slice(start, start + QUERIES)
        vectors = torch.tensor(queries[part])
        rows, columns = _pairs(known[0], known[1][part])
        limits = _limits(vectors, passages, rows, columns, margin)
        scores, indices = _nearest(vectors, passages, (rows, columns), limits, count)
        found[part, : indices.shape[1]] = torch.where(scores > -torch.inf, indices, -1).numpy()
    return found


def _pairs(known: np.ndarray, bounds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Row and passage of every known positive of some queries."""
    columns = [known[begin:end] for begin, end in bounds]
    rows = np.repeat(np.arange(len(bounds)), bounds[:, 1] - bounds[:, 0])
    return torch.from_numpy(rows), torch.from_numpy(np.concatenate(columns).astype(np.int64))


def _limits(
    vectors: Tensor, passages: np.ndarray, rows: Tensor, columns: Tensor, margin: float
) -> Tensor:
    """Highest score that a negative of each query may have, shape ``(q,)``."""
    positives = torch.tensor(passages[columns.numpy()])
    scores = (vectors[rows] * positives).sum(-1)
    lowest = torch.full((len(vectors),), torch.inf)
    lowest = lowest.scatter_reduce(0, rows, scores, "amin")
    return torch.where(lowest > 0, margin * lowest, torch.inf)


def _nearest(
    vectors: Tensor,
    passages: np.ndarray,
    known: tuple[Tensor, Tensor],
    limits: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Best allowed scores over pieces of the passages, and which passages they are."""
    rows, columns = known
    best = torch.empty(len(vectors), 0)
    where = torch.empty(len(vectors), 0, dtype=torch.int64)
    for start in range(0, len(passages), PASSAGES):
        piece = torch.tensor(passages[start : start + PASSAGES])
        scores = vectors @ piece.T
        scores = scores.masked_fill(scores > limits[:, None], -torch.inf)
        here = (columns >= start) & (columns < start + len(piece))
        scores[rows[here], columns[here] - start] = -torch.inf
        merged = torch.cat([best, scores], dim=1)
        numbers = torch.arange(start, start + len(piece)).expand(len(vectors), -1)
        best, order = merged.topk(min(count, merged.shape[1]), dim=1)
        where = torch.cat([where, numbers], dim=1).gather(1, order)
    return best, where


def negatives_key(
    texts: TokenizedTexts, rows: RowTable, model: str, settings: tuple[float, ...]
) -> str:
    """Name of a cache file: all that mined negatives depend on.

    Args:
        texts: The texts.
        rows: Queries with their positives.
        model: Fingerprint of the model that finds them.
        settings: Count and margin.
    """
    digest = hashlib.sha256(repr((FORMAT, model, settings)).encode())
    for array in (texts.ids, texts.starts, rows.texts, rows.starts, rows.positives):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:24]


def cached_negatives(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Mined negatives from their file, which is made if there is none.

    Args:
        path: ``.npy`` file; its name must hold :func:`negatives_key`.
        compute: Mines them.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.is_file():
        save_array(compute(), path)
    return np.asarray(load_array(path))
