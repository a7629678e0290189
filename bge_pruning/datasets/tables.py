"""Rows with named columns: CSV, TSV and JSON lines, and Hugging Face datasets."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.text_files import (
    check_file,
    expand_paths,
    hash_file,
    parse_row,
    read_lines,
)
from bge_pruning.utils.run_log import log_hub

log = logging.getLogger(__name__)

HUB = "hf://"

TableRow = tuple[str, dict[str, Any]]
# The line in which a row ends, and its cells.
CellRows = Iterator[tuple[int, list[str]]]
# Characters: the whole of a long book. The csv module's own limit is 131,072.
LARGEST_CELL = 1 << 26
# Quotes around, and all inside doubled, as CSV writes a cell with quotes and no text has it.
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


@dataclass(frozen=True)
class Table:
    """Location of rows, and the names of their columns.

    Attributes:
        path: ``.csv``, ``.tsv`` or ``.jsonl`` file, plain or ``.gz``, or ``hf://`` and the name or
            folder of a Hugging Face dataset.
        columns: The file's name of a column, by ours; a column that is not listed is called alike.
    """

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether it is a Hugging Face dataset."""
        return self.path.startswith(HUB)


@dataclass(frozen=True)
class Layout:
    """The file's name of each column by ours, those that must be there, and a headerless order."""

    names: Mapping[str, str]
    required: tuple[str, ...]
    headerless: tuple[str, ...]


def read_table(
    table: Table,
    required: Sequence[str],
    bad: BadRows,
    optional: Sequence[str] = (),
    headerless: Sequence[str] = (),
) -> Iterator[TableRow]:
    """Read rows as dicts by our names of the columns, each with its location for messages.

    Args:
        optional: Columns to read too if they are there.
        headerless: Columns, in order, of a CSV file whose first line names none of ours.

    Raises:
        FileNotFoundError: If there is no such file or dataset.
        ValueError: If the file is of another type or a row is wrong.
    """
    names = {name: table.columns.get(name, name) for name in (*required, *optional)}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{table.path}: columns gives two of {', '.join(names)} the same name. To fix, name "
            f"each column once."
        )
    if table.on_hub:
        yield from _hub_rows(table, required, optional)
        return
    path = Path(table.path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readers = {
        ".csv": partial(_text_rows, _csv_cells),
        ".tsv": partial(_text_rows, _tsv_cells),
        ".jsonl": _json_rows,
    }
    if suffix not in readers and check_file(path):
        raise ValueError(
            f"{path}: file type '{suffix}' is not one of {', '.join(sorted(readers))}. To fix, "
            f"convert it; texts without labels, one a line, may be in a .txt file."
        )
    layout = Layout(names, tuple(required), tuple(headerless))
    yield from readers[suffix](path, layout, bad)


def table_paths(pattern: str) -> list[str]:
    """The files of a path that may hold wildcards, see :func:`expand_paths`, or an ``hf://`` name.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    return [pattern] if pattern.startswith(HUB) else [str(p) for p in expand_paths(pattern)]


def fingerprint_table(table: Table) -> str:
    """Changes when the table's content does; files are hashed, datasets have a fingerprint."""
    if table.on_hub:
        return f"{table.path} {table.subset} {table.split} {_load_dataset(table)._fingerprint}"
    return hash_file(Path(table.path))


def _json_rows(path: Path, layout: Layout, bad: BadRows) -> Iterator[TableRow]:
    required = [layout.names[name] for name in layout.required]
    for line, content in read_lines(path, bad):
        if not content.strip():
            continue
        where = f"{path}:{line}"
        row = bad.attempt(parse_row, content, where, required)
        if row is not None:
            yield where, {o: row[theirs] for o, theirs in layout.names.items() if theirs in row}


def _text_rows(
    cells_of: Callable[[Path, BadRows], CellRows], path: Path, layout: Layout, bad: BadRows
) -> Iterator[TableRow]:
    """Rows of a file whose first line may be a header."""
    order: dict[str, int] | None = None
    width = 0
    for line, cells in cells_of(path, bad):
        where = f"{path}:{line}"
        if len(cells) < 2 and not "".join(cells).strip():
            continue  # an empty line
        if order is None:
            order, is_header = _column_order(cells, layout, where)
            width = len(cells)
            if is_header:
                continue
        row = None
        with bad.guard():
            if len(cells) != width:
                raise ValueError(
                    f"{where}: has {len(cells)} columns, expected {width} as in the first line. To "
                    f"fix, correct or remove the line; a text that contains the delimiter needs "
                    f"quotes, and in a .tsv file, whose quotes are text, it cannot stand."
                )
            row = {name: cells[index] for name, index in order.items()}
        if row is not None:
            yield where, row


def _csv_cells(path: Path, bad: BadRows) -> CellRows:
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
    lines = (text for _, text in read_lines(path, bad, "surrogateescape"))
    # Strict: a quote that is left open would otherwise swallow the rest of the file.
    reader = csv.reader(lines, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            refusal = _describe_csv_error(error, f"{path}:{reader.line_num}", first)
            if reader.line_num > first:  # rows cannot be told apart: this is more than one to skip
                raise refusal from None
            with bad.guard():
                raise refusal from None
            continue
        if cells is None:
            return
        yield reader.line_num, cells


def _describe_csv_error(error: csv.Error, where: str, first: int) -> ValueError:
    reason = {
        "unexpected end of data": "the file ends inside of a quoted cell",
        "',' expected after '\"'": "text follows a closing quote",
        f"field larger than field limit ({csv.field_size_limit()})": (
            f"a cell has more than {csv.field_size_limit():,} characters"
        ),
    }.get(str(error), str(error))
    return ValueError(
        f"{where}: {reason}. To fix, look for a quote left open in the row that begins in line "
        f"{first}; inside of a quoted cell a quote is written twice."
    )


def _tsv_cells(path: Path, bad: BadRows) -> CellRows:
    """Cells between tabs. Quotes are text, as in the files of GLUE and STS-B."""
    warned = False
    for line, text in read_lines(path, bad, "surrogateescape"):
        cells = text.rstrip("\r\n").split("\t")
        if not warned and '""' in text and any(map(QUOTED.fullmatch, cells)):
            _warn_of_quotes(path, line)
            warned = True
        yield line, cells


@lru_cache
def _warn_of_quotes(path: Path, line: int) -> None:
    """Say it once: a source is read twice."""
    log.warning(
        "%s:%d: a cell looks quoted as in CSV, but quotes are text in a .tsv file and stay. To "
        "fix, convert the file to .csv or .jsonl if they are not meant.",
        *(path, line),
    )


def _column_order(first: list[str], layout: Layout, where: str) -> tuple[dict[str, int], bool]:
    """Index of each column, and whether the first line is a header."""
    names, headerless = layout.names, layout.headerless
    # A text may be called like a column; the first of ours is hardly a text.
    marks = layout.required[:1] or tuple(names)
    renamed = any(ours != theirs for ours, theirs in names.items())
    if not renamed and not any(names[name] in first for name in marks):
        if len(first) != len(headerless):
            expected = ", ".join(headerless or layout.required or names)
            tabs = " It has tabs: is it a .tsv file?" if "\t" in first[0] else ""
            raise ValueError(
                f"{where}: has {len(first)} columns and no header, expected {expected}.{tabs} To "
                f"fix, correct the line or add a header that names those columns. "
                f"{_suggest_columns(first, layout)}"
            )
        if _is_word(first[-1]):  # in the place of a score
            raise ValueError(
                f"{where}: names no column {' or '.join(marks)}, and without a header the last "
                f"column is a score, not '{first[-1][:40]}'. To fix, correct or remove the line. "
                f"{_suggest_columns(first, layout)}"
            )
        return {name: index for index, name in enumerate(headerless)}, False
    missing = [names[name] for name in layout.required if names[name] not in first]
    if missing:
        raise ValueError(
            f"{where}: the header lacks {', '.join(missing)}. To fix, rename columns. "
            f"{_suggest_columns(first, layout)}"
        )
    if double := [theirs for theirs in names.values() if first.count(theirs) > 1]:
        raise ValueError(
            f"{where}: the header names {', '.join(double)} twice. To fix, rename a column."
        )
    return {o: first.index(theirs) for o, theirs in names.items() if theirs in first}, True


def _is_word(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return bool(cell.strip())
    return False


def _suggest_columns(first: list[str], layout: Layout) -> str:
    """The line of a configuration that reads a header of other names."""
    ours = layout.required or ("text",)
    theirs = first if len(first) == len(ours) else ["..."] * len(ours)
    pairs = ", ".join(f"{o}: {_yaml_name(t)}" for o, t in zip(ours, theirs, strict=True))
    found = ", ".join(_yaml_name(name) for name in first)
    return f"If it is a header ({found}), add columns: {{{pairs}}} to the source."


def _yaml_name(name: str) -> str:
    plain = re.fullmatch(r"\w[\w .-]*|\.{3}", name)
    return name[:40] if plain else json.dumps(name[:40], ensure_ascii=False)


def _hub_rows(table: Table, required: Sequence[str], optional: Sequence[str]) -> Iterator[TableRow]:
    dataset = _load_dataset(table)
    names = {name: table.columns.get(name, name) for name in (*required, *optional)}
    missing = [names[name] for name in required if names[name] not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{table.path}: has no column {', '.join(missing)}, but "
            f"{', '.join(dataset.column_names)}. To fix, name them under columns of the source."
        )
    present = {ours: theirs for ours, theirs in names.items() if theirs in dataset.column_names}
    dataset = dataset.select_columns(sorted(set(present.values())))
    for index, row in enumerate(dataset):
        yield f"{table.path}:{index}", {ours: row[theirs] for ours, theirs in present.items()}


def _load_dataset(table: Table) -> Any:
    """The split of a Hugging Face dataset, memory-mapped."""
    import datasets

    name = table.path.removeprefix(HUB)
    if not name:
        raise ValueError(f"{table.path} names no dataset. To fix, write hf://owner/name.")
    log_hub(table.path)
    # load_dataset also raises what the hub's client, its builders and its file systems raise.
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        return datasets.load_dataset(name, table.subset, split=table.split, revision=table.revision)
    except failures as error:
        raise FileNotFoundError(
            f"{table.path}: cannot load split '{table.split}' of this dataset "
            f"({type(error).__name__}: {str(error).strip()[:300]}). To fix, check name, subset and "
            f"split, and that the hub can be reached or has been (HF_HUB_OFFLINE reads its cache)."
        ) from None
