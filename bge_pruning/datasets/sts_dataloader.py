"""Reading sentence pairs with gold scores, and plain sentences.

Formats: CSV and TSV with columns ``sentence1, sentence2, score`` (with or without a header), JSONL
with those keys. Plain sentences: a text file with one a line, or the sentences of such pairs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.datasets.text_files import check_unicode, parse_row

COLUMNS = ("sentence1", "sentence2", "score")
MAX_SCORE = 5.0


@dataclass(frozen=True)
class STSPairs:
    """Sentence pairs with gold similarity in [0, 5], three lists of the same length."""

    sentences1: list[str]
    sentences2: list[str]
    scores: list[float]

    def __len__(self) -> int:
        return len(self.scores)


def read_sts(path: str | Path) -> STSPairs:
    """Read scored sentence pairs.

    Args:
        path: ``.csv``, ``.tsv`` or ``.jsonl`` file, UTF-8.

    Returns:
        All pairs, in file order.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty or a row is wrong; the message names file and line.
    """
    path = Path(path)
    pairs = STSPairs([], [], [])
    for line, row in _rows(path):
        where = f"{path}:{line}"
        for name, texts in (("sentence1", pairs.sentences1), ("sentence2", pairs.sentences2)):
            text = row[name]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}: {name} is empty. To fix, correct or remove the line.")
            check_unicode(text, f"{where}: {name}")
            texts.append(text)
        pairs.scores.append(_score(row["score"], where))
    if not pairs.scores:
        raise ValueError(f"{path}: holds no sentence pairs. To fix, choose another file.")
    return pairs


def read_sts_tasks(files: Sequence[str | Path]) -> dict[str, STSPairs]:
    """The pairs of several files, under the stem of each.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no file, two have one stem, or :func:`read_sts` refuses one.
    """
    if not files:
        raise ValueError("no task to evaluate on. To fix, give at least one STS file.")
    tasks: dict[str, STSPairs] = {}
    for file in files:
        if (task := Path(file).stem) in tasks:
            raise ValueError(
                f"two STS files are called {task}. To fix, rename one: the name is the task's."
            )
        tasks[task] = read_sts(file)
    return tasks


def read_sentences(path: str | Path) -> list[str]:
    """Read sentences without labels; each different sentence once, in order of appearance.

    Args:
        path: ``.txt`` file with one sentence a line (empty lines are skipped), or a file that
            :func:`read_sts` reads, whose scores are not used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty or not readable as above.
    """
    path = Path(path)
    if path.suffix == ".txt":
        texts = [line.strip() for line in _read_text(path).split("\n") if line.strip()]
    else:
        pairs = read_sts(path)
        texts = [t for pair in zip(pairs.sentences1, pairs.sentences2, strict=True) for t in pair]
    if not texts:
        raise ValueError(f"{path}: holds no sentences. To fix, choose another file.")
    return list(dict.fromkeys(texts))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows as dicts with the columns of ``COLUMNS``, each with its line number."""
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: file type '{path.suffix}' is not one of {sorted(readers)}. "
            f"To fix, convert it."
        )
    return readers[path.suffix](path, _read_text(path))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. To fix, check the path; it is relative to {Path.cwd()}."
        )
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: is not UTF-8. To fix, convert the file.") from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    order: list[int] | None = None
    for cells in _csv_cells(reader, path):
        where = f"{path}:{reader.line_num}"
        if order is None:
            order = _column_order(cells, where)
            if "sentence1" in cells:
                continue
        if not cells:
            continue
        if len(cells) <= max(order):
            raise ValueError(
                f"{where}: has {len(cells)} columns, expected {', '.join(COLUMNS)}. To fix, "
                f"correct or remove the line; a text that contains the delimiter needs quotes."
            )
        yield reader.line_num, {c: cells[i] for c, i in zip(COLUMNS, order, strict=True)}


def _csv_cells(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: {error}. To fix, look for a quote left open."
        ) from error


def _column_order(first: list[str], where: str) -> list[int]:
    if "sentence1" not in first:
        if len(first) != len(COLUMNS):
            raise ValueError(
                f"{where}: has {len(first)} columns and no header, expected {', '.join(COLUMNS)}. "
                f"To fix, correct the line or add a header that names those columns."
            )
        return [0, 1, 2]
    missing = [column for column in COLUMNS if column not in first]
    if missing:
        raise ValueError(f"{where}: the header lacks {', '.join(missing)}. To fix, rename columns.")
    return [first.index(column) for column in COLUMNS]


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: that also cuts at characters that JSON allows inside a text.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        yield line, parse_row(content, f"{path}:{line}", COLUMNS)


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if not 0.0 <= score <= MAX_SCORE:
        raise ValueError(
            f"{where}: score '{value}' is not a number in [0, 5]. To fix, correct or remove the "
            f"line."
        )
    return score
