"""Read sentence pairs with gold scores, and plain sentences.

Pairs: columns ``sentence1, sentence2, score`` of a CSV or TSV file (with or without a header), of
JSON lines, or of a Hugging Face dataset. Plain sentences: a text file with one a line, or the texts
of such a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.config.names import SOURCE_COLUMNS
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.tables import Table, read_table, table_paths
from bge_pruning.datasets.text_files import check_text, choose_lines, read_lines

COLUMNS = SOURCE_COLUMNS["sts"]
TEXT_COLUMNS = SOURCE_COLUMNS["sentences"]  # columns that hold texts, in any kind of table
SCORE_RANGE = (0.0, 5.0)


@dataclass(frozen=True)
class STSPairs:
    """Sentence pairs with gold similarity in [0, 5], three lists of the same length."""

    sentences1: list[str]
    sentences2: list[str]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.scores)


def read_sts(path: str | Path) -> STSPairs:
    """Read scored sentence pairs into memory."""
    pairs = STSPairs([], [], [])
    for row in read_pairs(Table(str(path))):
        pairs.sentences1.append(row.text)
        pairs.sentences2.extend(row.others)
        pairs.scores.extend(row.scores)
    if not pairs.scores:
        raise ValueError(f"{path}: holds no sentence pairs. To fix, choose another file.")
    return pairs


def read_pairs(
    table: Table, score_range: tuple[float, float] = SCORE_RANGE, bad: BadRows | None = None
) -> Iterator[Row]:
    """Read scored sentence pairs row by row."""
    bad = bad or BadRows()
    for where, cells in read_table(table, COLUMNS, bad, headerless=COLUMNS):
        row = bad.attempt(_parse_pair, cells, where, score_range)
        if row is not None:
            yield row


def _parse_pair(cells: Mapping[str, Any], where: str, score_range: tuple[float, float]) -> Row:
    first, second = (check_text(cells[n], f"{where}: {n}") for n in COLUMNS[:2])
    return Row(first, (second,), scores=(_parse_score(cells["score"], where, score_range),))


def _parse_score(value: Any, where: str, score_range: tuple[float, float]) -> float:
    low, high = score_range
    try:
        score = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = float("nan")
    if not low <= score <= high:
        raise ValueError(
            f"{where}: score '{str(value)[:40]}' is not a number in [{low:g}, {high:g}]. To fix, "
            f"correct or remove the line, or declare score_range for the source."
        )
    return score


def read_sentences(
    table: Table, bad: BadRows | None = None, lines: str | None = None
) -> Iterator[Row]:
    """Read sentences without labels.

    A ``.txt`` file (plain or ``.gz``) has one sentence a line, of which empty ones are skipped; of
    a table every column in ``TEXT_COLUMNS`` is read.

    Args:
        lines: Which lines of a text file, see :func:`choose_lines`.

    Raises:
        ValueError: If a row is invalid, or lines are chosen that are not there or of a table.
    """
    bad = bad or BadRows()
    if not table.on_hub and table.path.endswith((".txt", ".txt.gz")):
        yield from _text_lines(Path(table.path), bad, lines)
    elif lines is not None:
        raise ValueError(
            f"{table.path}: lines '{lines}' can be chosen of a .txt file alone. To fix, leave lines"
            f" out, or cut the data."
        )
    else:
        yield from _table_texts(table, bad)


def read_texts(files: Sequence[str], limit: int | None = None) -> list[str]:
    """Read the different texts of some files or patterns; at most ``limit``, spread evenly.

    Raises:
        ValueError: If a file holds no text, or a row is invalid.
    """
    found: dict[str, None] = {}
    for path in (path for file in files for path in table_paths(file)):
        rows = dict.fromkeys(row.text for row in read_sentences(Table(path)))
        if not rows:
            raise ValueError(f"{path}: holds no text. To fix, choose another file.")
        found |= rows
    texts = list(found)
    if limit is None or len(texts) <= limit:
        return texts
    return [texts[i * len(texts) // limit] for i in range(limit)]


def _text_lines(path: Path, bad: BadRows, lines: str | None) -> Iterator[Row]:
    chosen = None if lines is None else choose_lines(path, lines)[0]
    for _, content in read_lines(path, bad, chosen=chosen):
        if text := content.strip():
            yield Row(text)


def _table_texts(table: Table, bad: BadRows) -> Iterator[Row]:
    # Without a header, a CSV file is one of scored pairs.
    for where, cells in read_table(table, (), bad, optional=TEXT_COLUMNS, headerless=COLUMNS):
        yield from map(Row, bad.attempt(_texts_of, cells, where) or ())


def _texts_of(cells: Mapping[str, Any], where: str) -> list[str]:
    texts = []
    for name in (name for name in TEXT_COLUMNS if name in cells):
        values = cells[name] if isinstance(cells[name], list) else [cells[name]]
        texts += [check_text(value, f"{where}: {name}") for value in values]
    if not texts:
        raise ValueError(
            f"{where}: has none of {', '.join(TEXT_COLUMNS)}. To fix, say under columns of the "
            f"source how its text is called."
        )
    return texts
