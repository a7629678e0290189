"""Queries with positive and negative passages: reading the BGE format, and examples of it.

A row is ``{"query": str, "pos": [str, ...], "neg": [str, ...]}``, one JSON object a line, plain or
``.gz``; optional are ``pos_scores``, ``neg_scores`` (a teacher's scores) and ``prompt`` (written
before the query). Texts and rows are kept in arrays, not in Python objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, teacher_items
from bge_pruning.datasets.text_files import check_unicode, parse_row, read_lines

KEYS = ("query", "pos", "neg")


@dataclass(frozen=True)
class ContrastiveRow:
    """One row of a file, checked."""

    query: str
    pos: list[str]
    neg: list[str]
    pos_scores: list[float] | None = None
    neg_scores: list[float] | None = None


def read_contrastive(path: str | Path) -> Iterator[ContrastiveRow]:
    """Read a file row by row.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz`` file, UTF-8.

    Yields:
        The rows, in file order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, damaged or a row is wrong; the message names file and
            line.
    """
    path = Path(path)
    found = False
    for line, content in read_lines(path):
        if content.strip():
            found = True
            yield _parse_row(content, f"{path}:{line}")
    if not found:
        raise ValueError(f"{path}: holds no rows. To fix, choose another file.")


def _parse_row(content: str, where: str) -> ContrastiveRow:
    row = parse_row(content, where, KEYS)
    query = _check_text(row["query"], f"{where}: query")
    if prompt := row.get("prompt"):
        query = _check_text(prompt, f"{where}: prompt") + query
    pos, neg = (_check_texts(row[key], f"{where}: {key}") for key in ("pos", "neg"))
    if not pos:
        raise ValueError(f"{where}: pos is empty. To fix, add a passage or remove the line.")
    return ContrastiveRow(
        query,
        pos,
        neg,
        _check_scores(row.get("pos_scores"), len(pos), f"{where}: pos_scores"),
        _check_scores(row.get("neg_scores"), len(neg), f"{where}: neg_scores"),
    )


def _check_texts(value: Any, what: str) -> list[str]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list. To fix, write a list of texts.")
    return [_check_text(text, f"{what}[{index}]") for index, text in enumerate(value)]


def _check_text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is empty or no text. To fix, correct or remove the line.")
    check_unicode(value, what)
    return value


def _check_scores(value: Any, count: int, what: str) -> list[float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in value
    )
    if not numbers or len(value) != count:
        raise ValueError(
            f"{what} must be {count} numbers, one for each text. To fix, correct the line."
        )
    return [float(v) for v in value]


@dataclass(frozen=True)
class ContrastiveRows:
    """Rows as indices into a table of texts.

    Attributes:
        queries: Text of each row's query, shape ``(n,)``.
        positives: Texts of the positives of all rows, one after the other.
        positive_starts: Start of each row in ``positives``, and the end; shape ``(n + 1,)``.
        negatives: Texts of the given negatives of all rows.
        negative_starts: Same as ``positive_starts``.
    """

    queries: np.ndarray
    positives: np.ndarray
    positive_starts: np.ndarray
    negatives: np.ndarray
    negative_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)

    def positives_of(self, row: int) -> np.ndarray:
        """Texts of a row's positives."""
        return self.positives[self.positive_starts[row] : self.positive_starts[row + 1]]

    def negatives_of(self, row: int) -> np.ndarray:
        """Texts of a row's given negatives."""
        return self.negatives[self.negative_starts[row] : self.negative_starts[row + 1]]


def index_rows(given: Iterable[ContrastiveRow]) -> tuple[list[str], ContrastiveRows]:
    """Number the texts of rows, each different text once.

    Args:
        given: Rows of any number of sources, such as :func:`read_contrastive` yields them.

    Returns:
        The texts, and the rows in order.
    """
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    queries, pos, neg, pos_counts, neg_counts = [], [], [], [], []
    for row in given:
        queries.append(number(row.query))
        pos += [number(text) for text in row.pos]
        neg += [number(text) for text in row.neg]
        pos_counts.append(len(row.pos))
        neg_counts.append(len(row.neg))
    rows = ContrastiveRows(
        np.array(queries, np.int64),
        np.array(pos, np.int64),
        _starts(pos_counts),
        np.array(neg, np.int64),
        _starts(neg_counts),
    )
    return list(numbers), rows


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def sample_example(
    rows: ContrastiveRows, row: int, negatives: int, seed: int, epoch: int
) -> np.ndarray:
    """The texts of one example: the query, one positive, and some negatives.

    Which positive and negatives are drawn follows from ``(seed, epoch, row)`` alone. A row with too
    few negatives repeats them, as FlagEmbedding does; a row with none has none.

    Args:
        rows: The rows.
        row: Which one.
        negatives: Given negatives per query.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        Text indices ``[query, positive, negative, ...]``, at most ``2 + negatives`` of them.
    """
    generator = np.random.default_rng((seed, epoch, row))
    positive = generator.choice(rows.positives_of(row))
    given = rows.negatives_of(row)
    if negatives == 0 or len(given) == 0:
        drawn = given[:0]
    elif len(given) >= negatives:
        drawn = generator.choice(given, negatives, replace=False)
    else:
        repeats = -(-negatives // len(given))
        drawn = generator.permutation(np.tile(given, repeats))[:negatives]
    return np.concatenate([[rows.queries[row], positive], drawn])


def known_positives(rows: ContrastiveRows) -> tuple[np.ndarray, np.ndarray]:
    """All positives of each row's query, over every row that has the same query.

    None of them may serve as a negative of the query.

    Args:
        rows: The rows.

    Returns:
        The texts of all rows, one after the other, and the start of each row, shape ``(n + 1,)``.
    """
    by_query: dict[int, list[int]] = {}
    for row, query in enumerate(rows.queries.tolist()):
        by_query.setdefault(query, []).append(row)
    merged = {
        query: np.unique(np.concatenate([rows.positives_of(row) for row in members]))
        for query, members in by_query.items()
    }
    values = [merged[query] for query in rows.queries.tolist()]
    return np.concatenate(values), _starts([len(value) for value in values])


class ContrastiveDataset(Dataset):
    """Examples of a query, a positive and negatives; others are drawn in every epoch.

    An index is ``epoch * len(dataset) + row``, so that an example follows from its index alone,
    in whichever process it is made.

    Args:
        texts: The texts, tokenised.
        rows: Rows over them.
        negatives: Given negatives per query; every row must have at least one if it is not 0.
        seed: Seed of the draws.
        teacher: See :class:`EmbeddingDataset`.

    Raises:
        ValueError: If negatives are asked for and a row has none.
    """

    def __init__(
        self,
        texts: TokenizedTexts,
        rows: ContrastiveRows,
        negatives: int,
        seed: int,
        teacher: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        without = int((np.diff(rows.negative_starts) == 0).sum())
        if negatives and without:
            raise ValueError(
                f"data.negatives is {negatives}, but {without} of {len(rows)} rows have no neg. To "
                f"fix, set data.negatives=0 (the other passages of a batch still are negatives) or "
                f"give every row a neg."
            )
        self.texts = texts
        self.rows = rows
        self.negatives = negatives
        self.seed = seed
        self.teacher = dict(teacher or {})
        self.known, self.known_starts = known_positives(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's query and longest positive, shape ``(n,)``."""
        rows, lengths = self.rows, self.texts.lengths
        positives = np.maximum.reduceat(lengths[rows.positives], rows.positive_starts[:-1])
        return np.maximum(lengths[rows.queries], positives)

    def __getitem__(self, index: int) -> dict[str, object]:
        """Token ids of query and passages, and which texts they are."""
        epoch, row = divmod(index, len(self))
        example = sample_example(self.rows, row, self.negatives, self.seed, epoch)
        return {
            "ids": [self.texts[i] for i in example],
            "passage_texts": example[1:],
            "positive_texts": self.known[self.known_starts[row] : self.known_starts[row + 1]],
            **teacher_items(self.teacher, self.texts, example),
        }
