"""Rows with named columns: CSV, TSV and JSON lines, and Hugging Face datasets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.config.columns import Column, describe_missing, find_column
from bge_pruning.config.names import HUB, check_hub_data
from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.text_files import (
    CellRows,
    check_file,
    csv_cells,
    expand_paths,
    hash_file,
    parse_row,
    read_lines,
    tsv_cells,
)
from bge_pruning.utils.files import atomic_file
from bge_pruning.utils.run_log import log_hub

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

# Rows of a stream among which the next one is drawn.
BUFFER = 10_000

TableRow = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Location of rows, and the names of their columns.

    Attributes:
        path: ``.csv``, ``.tsv`` or ``.jsonl`` file, plain or ``.gz``, ``.parquet`` file, or
            ``hf://`` and the name or folder of a Hugging Face dataset.
        columns: What we call a column, and the file, see :mod:`bge_pruning.config.columns`; one
            that is not listed is called alike.
        data_files: Pattern of the files of a Hugging Face dataset.
        collection: Tables of the texts whose ids its rows name, by ``query`` and ``passage``.
    """

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    data_files: str | None = None
    collection: Mapping[str, Table] = field(default_factory=dict)

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

    @classmethod
    def of(
        cls, table: Table, required: Sequence[str], optional: Sequence[str], order: Sequence[str]
    ) -> Layout:
        """The columns of a table to read; one that the table lists must be there.

        Raises:
            ValueError: If two are to be the same.
        """
        names = {name: table.columns.get(name, name) for name in (*required, *optional)}
        if len(set(names.values())) < len(names):
            raise ValueError(
                f"{table.path}: columns gives two of {', '.join(names)} the same name. To fix, "
                f"name each column once."
            )
        listed = [name for name in optional if name in table.columns]
        return cls(names, (*required, *listed), tuple(order))

    def find(self, there: Sequence[str]) -> dict[str, Column]:
        """The columns by our names, of those that a table has."""
        found = {ours: find_column(spec, there) for ours, spec in self.names.items()}
        return {ours: column for ours, column in found.items() if column is not None}

    def missing(self, found: Mapping[str, Column]) -> list[str]:
        """Required columns that were not found, as the table would call them."""
        return [self.names[ours] for ours in self.required if ours not in found]

    def find_all(self, there: Sequence[str], where: str) -> dict[str, Column]:
        """As :meth:`find`; the required ones must be there."""
        if missing := self.missing(found := self.find(there)):
            raise ValueError(
                f"{where}: has no column {describe_missing(missing, there)}. To fix, name them "
                f"under columns of the source."
            )
        return found


def _pick(columns: Mapping[str, Column], row: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {ours: column.read(row, where) for ours, column in columns.items()}


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
    layout = Layout.of(table, required, optional, headerless)
    if table.on_hub:
        yield from _hub_rows(table, layout, bad)
        return
    path = Path(table.path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readers = {
        ".csv": partial(_text_rows, csv_cells),
        ".tsv": partial(_text_rows, tsv_cells),
        ".jsonl": _json_rows,
        ".parquet": _parquet_rows,
    }
    if suffix not in readers and check_file(path):
        raise ValueError(
            f"{path}: file type '{suffix}' is not one of {', '.join(sorted(readers))}. To fix, "
            f"convert it; texts without labels, one a line, may be in a .txt file."
        )
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
        return f"{table.path} {table.subset} {table.split} {load_table(table)._fingerprint}"
    return hash_file(Path(table.path))


def _json_rows(path: Path, layout: Layout, bad: BadRows) -> Iterator[TableRow]:
    # Names of parts and patterns are looked for in the row; the others are missing as they are.
    required = [layout.names[o] for o in layout.required if not set(layout.names[o]) & set("[.*")]
    known: dict[tuple[str, ...], dict[str, Column]] = {}

    def read(content: str, where: str) -> dict[str, Any]:
        row = parse_row(content, where, required)
        if (keys := tuple(row)) not in known:
            known[keys] = layout.find_all(keys, where)
        return _pick(known[keys], row, where)

    for line, content in read_lines(path, bad):
        where = f"{path}:{line}"
        if content.strip() and (row := bad.attempt(read, content, where)) is not None:
            yield where, row


def _parquet_rows(path: Path, layout: Layout, bad: BadRows) -> Iterator[TableRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(check_file(path), memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: is no whole parquet file ({error}). To fix, copy it again."
        ) from None
    columns = layout.find_all(file.schema_arrow.names, str(path))
    wanted = [name for column in columns.values() for name in column.names]
    rows = (row for batch in file.iter_batches(1024, columns=wanted) for row in batch.to_pylist())
    yield from _numbered_rows(str(path), columns, rows, bad)


def _numbered_rows(
    path: str, columns: Mapping[str, Column], rows: Iterator[Mapping[str, Any]], bad: BadRows
) -> Iterator[TableRow]:
    for index, row in enumerate(rows):
        where = f"{path}:{index}"
        if (cells := bad.attempt(_pick, columns, row, where)) is not None:
            yield where, cells


def _text_rows(
    cells_of: Callable[[Path, BadRows], CellRows], path: Path, layout: Layout, bad: BadRows
) -> Iterator[TableRow]:
    """Rows of a file whose first line may be a header."""
    header: list[str] = []
    columns: dict[str, Column] = {}
    for line, cells in cells_of(path, bad):
        where = f"{path}:{line}"
        if len(cells) < 2 and not "".join(cells).strip():
            continue  # an empty line
        if not header:
            header = _read_header(cells, layout, where)
            columns = layout.find(header)
            if header is cells:
                continue
        row = None
        with bad.guard():
            if len(cells) != len(header):
                raise ValueError(
                    f"{where}: has {len(cells)} columns, expected {len(header)} as in the first "
                    f"line. To fix, correct or remove the line; a text that contains the delimiter "
                    f"needs quotes, and in a .tsv file, whose quotes are text, it cannot stand."
                )
            row = _pick(columns, dict(zip(header, cells, strict=True)), where)
        if row is not None:
            yield where, row


def _read_header(first: list[str], layout: Layout, where: str) -> list[str]:
    """The name of each column: the first line itself, or ours if that is a row."""
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
        return list(headerless)
    found = layout.find(first)
    if missing := layout.missing(found):
        raise ValueError(
            f"{where}: the header lacks {', '.join(missing)}. To fix, rename columns. "
            f"{_suggest_columns(first, layout)}"
        )
    if double := [n for column in found.values() for n in column.names if first.count(n) > 1]:
        raise ValueError(
            f"{where}: the header names {', '.join(double)} twice. To fix, rename a column."
        )
    return first


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


def _hub_rows(table: Table, layout: Layout, bad: BadRows) -> Iterator[TableRow]:
    dataset = load_table(table)
    columns = layout.find_all(dataset.column_names, table.path)
    wanted = {name for column in columns.values() for name in column.names}
    rows = iter(dataset.select_columns(sorted(wanted)))
    yield from _numbered_rows(table.path, columns, rows, bad)


def load_table(
    table: Table, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """The split of a Hugging Face dataset, memory-mapped, or as a stream of its rows.

    Raises:
        FileNotFoundError: If there is none, or none that can be reached.
        ValueError: If the name is that of a dataset that cannot be loaded, or none.
    """
    import datasets

    name = table.path.removeprefix(HUB)
    if not name:
        raise ValueError(f"{table.path} names no dataset. To fix, write hf://owner/name.")
    check_hub_data(name, table.path)
    log_hub(table.path)
    with _one_line(table):
        builder = datasets.load_dataset_builder(
            name, table.subset, data_files=table.data_files, revision=table.revision
        )
        splits = [str(split) for split in builder.info.splits or builder.config.data_files or ()]
        split = re.split(r"[\[+]", table.split)[0]
        if splits and split not in splits:
            raise ValueError(f"it has {', '.join(splits)}")
        if streaming:
            return builder.as_streaming_dataset(table.split)
        builder.download_and_prepare()
        return builder.as_dataset(table.split)


@contextmanager
def _one_line(table: Table) -> Iterator[None]:
    """Say why a dataset cannot be read; its files and its library raise many kinds of errors."""
    import datasets

    # What the hub's client, its builders and its file systems raise.
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        yield
    except failures as error:
        reason = " ".join(str(error).split())
        if found := re.search(r"BuilderConfig '(.*?)' not found. Available: (\[.*\])", reason):
            there = re.findall(r"'(.*?)'", found[2])
            reason = f"there is no subset {describe_missing([found[1]], there)}"
        raise FileNotFoundError(
            f"{table.path}: cannot load split '{table.split}' of this dataset "
            f"({type(error).__name__}: {reason[:400]}). To fix, check name, subset and split, and "
            f"that the hub can be reached or has been (HF_HUB_OFFLINE reads its cache); a dataset "
            f"with terms needs HF_TOKEN of an account that accepted them."
        ) from None


def draw_rows(
    table: Table,
    required: Sequence[str],
    optional: Sequence[str],
    count: int,
    seed: int,
    path: Path,
) -> None:
    """Write some rows of a Hugging Face dataset as JSON lines; no others are downloaded.

    Each is drawn at random among the next :data:`BUFFER` rows of up to ten of its files, which
    follow each other in random order. The seed decides which.

    Args:
        required: Our names of columns that must be there; the first row shows whether they are.
        optional: Those of other columns to keep; without required ones, one must be there.

    Raises:
        FileNotFoundError: As :func:`load_table`.
        ValueError: If a column is not there.
    """
    log.info("%s: drawing %d rows of %s", table.path, count, table.subset or table.split)
    stream = load_table(table, streaming=True)
    layout = Layout.of(table, required, optional, ())
    found: dict[str, Column] = {}
    drawn = 0
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        rows = iter(islice(stream.shuffle(seed, buffer_size=BUFFER), count))
        while (row := _next_of(rows, table)) is not None:
            if not drawn and not (found := layout.find_all(list(row), table.path)):
                Layout.of(table, optional, (), ()).find_all(list(row), table.path)  # which raises
            kept = {name: row[name] for column in found.values() for name in column.names}
            file.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")
            drawn += 1
    if drawn < count:
        log.warning("%s: holds %d rows, of which %d were asked for", table.path, drawn, count)


def _next_of(rows: Iterator[dict[str, Any]], table: Table) -> dict[str, Any] | None:
    with _one_line(table):
        return next(rows, None)
