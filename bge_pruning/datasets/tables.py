"""Rows with named columns: CSV, TSV and JSON lines, and Hugging Face datasets."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.text_files import hash_file, parse_row, read_lines
from bge_pruning.utils.run_log import log_hub

HUB = "hf://"

TableRow = tuple[str, dict[str, Any]]


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
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows}
    if suffix not in readers:
        raise ValueError(
            f"{path}: file type '{suffix}' is not one of {', '.join(sorted(readers))}. To fix, "
            f"convert it; texts without labels, one a line, may be in a .txt file."
        )
    layout = Layout(names, tuple(required), tuple(headerless))
    yield from readers[suffix](path, layout, bad)


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


def _csv_rows(path: Path, layout: Layout, bad: BadRows) -> Iterator[TableRow]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    lines = (text for _, text in read_lines(path, bad, "surrogateescape"))
    # Strict: a quote that is left open would otherwise swallow the rest of the file.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    order: dict[str, int] | None = None
    width = 0
    for cells in _csv_cells(reader, path):
        where = f"{path}:{reader.line_num}"
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
                    f"quotes."
                )
            row = {name: cells[index] for name, index in order.items()}
        if row is not None:
            yield where, row


def _csv_cells(reader: Any, path: Path) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        # After an unclosed quote, rows cannot be told apart: this is more than a row to skip.
        raise ValueError(
            f"{path}:{reader.line_num}: {error}. To fix, look for a quote left open."
        ) from error


def _column_order(first: list[str], layout: Layout, where: str) -> tuple[dict[str, int], bool]:
    """Index of each column, and whether the first line is a header."""
    names, headerless = layout.names, layout.headerless
    # A text may be called like a column; the first of ours is hardly a text.
    marks = layout.required[:1] or tuple(names)
    renamed = any(ours != theirs for ours, theirs in names.items())
    if not renamed and not any(names[name] in first for name in marks):
        if len(first) != len(headerless):
            expected = ", ".join(headerless or layout.required or names)
            raise ValueError(
                f"{where}: has {len(first)} columns and no header, expected {expected}. To fix, "
                f"correct the line or add a header that names those columns."
            )
        return {name: index for index, name in enumerate(headerless)}, False
    missing = [names[name] for name in layout.required if names[name] not in first]
    if missing:
        raise ValueError(f"{where}: the header lacks {', '.join(missing)}. To fix, rename columns.")
    if double := [theirs for theirs in names.values() if first.count(theirs) > 1]:
        raise ValueError(
            f"{where}: the header names {', '.join(double)} twice. To fix, rename a column."
        )
    return {o: first.index(theirs) for o, theirs in names.items() if theirs in first}, True


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
