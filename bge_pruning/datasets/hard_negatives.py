"""Hard negatives: passages that a model takes for answers of a query, but that are not.

Positive-aware mining with a margin relative to the positive's score, "TopK-PercPos" of NV-Retriever
(Moreira et al., 2024, arXiv:2407.15831): what is more similar to the query than that is too often
an answer that nobody judged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bge_pruning.datasets.contrastive_dataset import known_positives
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.datasets.rows import RowTable
from bge_pruning.datasets.teacher_vectors import Vectors
from bge_pruning.datasets.text_files import DIGEST_BYTES, compute_digest
from bge_pruning.utils.files import atomic_file, lock_of

# ``sentence_transformers.util.semantic_search`` would rank passages too, but it knows neither the
# known positives nor the highest score of each query: it would have to return all passages to be
# filtered afterwards. It also leaves open which of equal scores come first.

# Raised when other negatives are found for the same input.
FORMAT = 2
# Ends a file of them, with a checksum: its layout, and the version of that.
SEAL = b"\nbge_pruning array 1 "


def mine_negatives(
    query_vectors: np.ndarray | Vectors,
    passage_vectors: np.ndarray | Vectors,
    known: tuple[np.ndarray, np.ndarray],
    count: int,
    margin: float = 0.95,
    chunk: int = 4096,
    device: torch.device | str = "cpu",
    barred: tuple[np.ndarray, np.ndarray] | None = None,
    parts: Path | None = None,
) -> np.ndarray:
    """Find the hard negatives of each query.

    They are the passages most similar to it, without its known positives and without what scores
    above ``margin`` times its best known positive. No bound is put on a query whose best positive
    does not score above 0, or that has none. Of passages that score alike, the one with the lower
    index comes first.

    Scores are computed for ``chunk`` queries and ``chunk`` passages at a time, and no more of them,
    nor of the vectors, than that are held at once.

    Args:
        query_vectors: L2-normalised, float32, shape ``(q, H)``.
        passage_vectors: L2-normalised, float32, shape ``(p, H)``.
        known: Indices of the passages that are positives, and where those of each query begin and
            end among them, shape ``(q, 2)``, as
            :func:`bge_pruning.datasets.contrastive_dataset.known_positives` gives them.
        margin: Highest score of a negative, as a share of the best positive's.
        barred: Passages that are no negatives, as ``known``; default: those that are known.
        parts: Folder for those of each chunk of queries. A process that comes after a killed one
            finds there what it had; the folder's name must hold :func:`negatives_key`.

    Returns:
        Passage indices, most similar first, int64, shape ``(q, count)``; -1 where there are fewer.

    Raises:
        ValueError: If the vectors differ in size or are not finite.
    """
    if query_vectors.shape[1] != passage_vectors.shape[1]:
        raise ValueError(
            f"query vectors have {query_vectors.shape[1]} dimensions, passage vectors "
            f"{passage_vectors.shape[1]}. To fix, embed both with the same model."
        )
    barred = known if barred is None else barred

    def mine(rows: slice) -> np.ndarray:
        queries = _to_tensor(query_vectors[rows], "query", device)
        pairs = _known_pairs(known[0], known[1][rows])
        highest = _highest_scores(queries, passage_vectors, pairs, margin)
        pairs = _known_pairs(barred[0], barred[1][rows])
        scores, found = _nearest(queries, passage_vectors, pairs, highest, count, chunk)
        return torch.where(scores > -torch.inf, found, -1).cpu().numpy()

    negatives = np.full((len(query_vectors), count), -1, np.int64)
    for start in range(0, len(query_vectors), chunk):
        rows = slice(start, start + chunk)
        if parts is None:
            found = mine(rows)
        else:
            found = cached_negatives(parts / f"{start}-{chunk}.npy", partial(mine, rows))
        negatives[rows, : found.shape[1]] = found
    return negatives


def mine_rows(
    table: RowTable,
    rows: tuple[RowTable, RowTable],
    embed: Callable[[np.ndarray], np.ndarray | Vectors],
    settings: tuple[int, float],
    **options: object,
) -> np.ndarray:
    """The hard negatives of each query among the passages of a table: texts, ``(q, count)``.

    Args:
        rows: Those of queries with positives, and of queries that are passages themselves.
        embed: Computes the vectors of the texts with some numbers.
        settings: How many negatives, and the margin.
        options: More of :func:`mine_negatives`.
    """
    queries, own = rows
    # The passages of all rows, and passages that form a row alone.
    alone = np.diff(table.starts) == 1
    passages = np.unique(np.concatenate([table.texts[table.roles > 0], table.first[alone]]))
    vectors = embed(np.concatenate([queries.first, passages]))
    both = vectors[: len(queries)], vectors[len(queries) :]
    words = table.words_of(passages)
    order = np.argsort(words)
    known, barred = (
        (order[np.searchsorted(words, found, sorter=order)], bounds)
        for found, bounds in (known_positives(queries), known_positives(queries, own))
    )
    mined = mine_negatives(*both, known, *settings, barred=barred, **options)
    return np.where(mined < 0, -1, passages[mined])


def _to_tensor(vectors: np.ndarray | Vectors, kind: str, device: torch.device | str) -> Tensor:
    # A copy: the array may be a read-only map of a file.
    tensor = torch.tensor(np.asarray(vectors), dtype=torch.float32, device=device)
    if not tensor.isfinite().all():
        raise ValueError(
            f"{kind} vectors hold values that are not finite. To fix, check the model that made "
            f"them, and delete its cached vectors."
        )
    return tensor


def _known_pairs(values: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and passage of each known positive of some queries, by passage; each ``(pairs,)``."""
    counts = bounds[:, 1] - bounds[:, 0]
    rows = np.repeat(np.arange(len(bounds)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    passages = values[bounds[rows, 0] + within]
    order = np.argsort(passages, kind="stable")
    return rows[order], passages[order]


def _highest_scores(
    queries: Tensor,
    passage_vectors: np.ndarray | Vectors,
    pairs: tuple[np.ndarray, np.ndarray],
    margin: float,
) -> Tensor:
    """Highest score that a negative of each query may have, ``(q,)``."""
    rows = torch.from_numpy(pairs[0]).to(queries.device)
    positives = _to_tensor(passage_vectors[pairs[1]], "passage", queries.device)
    best = queries.new_full((len(queries),), -torch.inf)
    best.scatter_reduce_(0, rows, (queries[rows] * positives).sum(1), "amax")
    return torch.where(best > 0, best * margin, torch.inf)


def _nearest(
    queries: Tensor,
    passage_vectors: np.ndarray | Vectors,
    pairs: tuple[np.ndarray, np.ndarray],
    highest: Tensor,
    count: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The most similar passages of some queries that may be negatives of them.

    Returns scores, highest first, and passage indices, each of shape ``(q, count or fewer)``, with
    -inf where there are fewer.
    """
    rows, known = (torch.from_numpy(array).to(queries.device) for array in pairs)
    scores = queries.new_empty((len(queries), 0))
    found = torch.empty_like(scores, dtype=torch.int64)
    for start in range(0, len(passage_vectors), chunk):
        block = passage_vectors[start : start + chunk]
        products = queries @ _to_tensor(block, "passage", queries.device).T  # (q, passages)
        products = products.masked_fill(products > highest[:, None], -torch.inf)
        here = slice(*np.searchsorted(pairs[1], (start, start + chunk)))
        products[rows[here], known[here] - start] = -torch.inf
        new_scores, new = _top(products, min(count, len(block)))
        # Those found before have lower indices and come first, which a stable sort leaves so.
        scores, order = torch.cat([scores, new_scores], 1).sort(dim=1, descending=True, stable=True)
        found = torch.cat([found, new + start], 1).gather(1, order)
        scores, found = scores[:, :count], found[:, :count]
    return scores, found


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest scores of each row and their columns, of equal ones the lower columns."""
    values, columns = scores.topk(k)
    columns, order = columns.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # Of the scores that equal the last one, topk takes any. A full sort is slow, but seldom needed.
    last = values[:, -1:]
    open_rows = ((scores >= last).sum(1) > k) & last.isfinite().squeeze(1)
    if open_rows.any():
        ordered = scores[open_rows].sort(dim=1, descending=True, stable=True)
        values[open_rows], columns[open_rows] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, columns


def negatives_key(
    texts: TokenizedTexts, rows: RowTable, model: str, settings: tuple[object, ...]
) -> str:
    """Hash of all that mined negatives depend on; the ``repr`` of the settings must be exact."""
    digest = hashlib.sha256(repr((FORMAT, model, settings)).encode())
    arrays = (texts.ids, texts.starts, rows.texts, rows.starts, rows.positives)
    for array in arrays if rows.words is None else (*arrays, rows.words):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:24]


def cached_negatives(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Load mined negatives from the cache, or mine and store them.

    The file's name must hold :func:`negatives_key`. It is written as a whole or not at all, and by
    one process: others wait for it.

    Raises:
        ValueError: If the cache file is damaged.
    """
    if not path.is_file():
        with lock_of(path):
            if not path.is_file():
                save_array(compute(), path)
    return load_array(path)


def save_array(array: np.ndarray, path: Path) -> None:
    """Write a ``.npy`` file, and its folder if it is missing."""
    with atomic_file(path, unique=True) as partial:
        np.save(partial, array)
        _seal(partial)


def load_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file into memory, if it is sealed and whole."""
    try:
        _check_seal(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or not complete ({error}). To fix, delete it; it is made again."
        ) from error


def _seal(path: Path) -> None:
    digest = compute_digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(SEAL + digest)


def _check_seal(path: Path) -> None:
    size = path.stat().st_size - len(SEAL) - DIGEST_BYTES
    if size < 0:
        raise ValueError("it is too short")
    with path.open("rb") as file:
        file.seek(size)
        seal = file.read()
    if not seal.startswith(SEAL):
        raise ValueError("it does not end with the mark of version 1")
    if seal[len(SEAL) :] != compute_digest(path, size):
        raise ValueError("its checksum is not that of its content")
