"""Read text files by lines or by cells, with errors that name file and line."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bge_pruning.config.checks import check_slice
from bge_pruning.datasets.rows import BadRows

log = logging.getLogger(__name__)

# A checksum covers as many blocks, evenly spread: all of a file up to 1 GiB. The vectors of every
# token may be hundreds, which nobody would wait for at every start.
BLOCK = 1 << 20
BLOCKS = 1024
DIGEST_BYTES = 16
# Of files that hold texts.
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".gz", ".parquet")
# The line in which a row ends, and its cells.
CellRows = Iterator[tuple[int, list[str]]]
# Characters: the whole of a long book. The csv module's own limit is 131,072.
LARGEST_CELL = 1 << 26
# Quotes around, and all inside doubled, as CSV writes a cell with quotes and no text has it.
QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def expand_paths(pattern: str) -> list[Path]:
    """The files, sorted, of a path that may hold the wildcards ``*``, ``?`` and ``[...]``.

    Raises:
        FileNotFoundError: If there is no such file, or a pattern fits none.
        IsADirectoryError: If it is a folder.
    """
    if Path(pattern).exists() or not glob.has_magic(pattern):
        return [check_file(Path(pattern))]
    paths = sorted(filter(Path.is_file, map(Path, glob.glob(pattern, recursive=True))))
    if not paths:
        raise FileNotFoundError(
            f"{pattern}: fits no file. To fix, check the pattern; it is relative to {Path.cwd()}."
        )
    return paths


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content. A file that has not changed since is not read again."""
    found = check_file(path).stat()
    return _hash(path, found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=4096)
def _hash(path: Path, *changes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def compute_digest(path: Path, size: int) -> bytes:
    """Checksum of the first bytes of a file; of a large one, of blocks spread over it."""
    count = -(-size // BLOCK)
    chosen = range(count)
    if count > BLOCKS:
        chosen = [block * (count - 1) // (BLOCKS - 1) for block in range(BLOCKS)]
    digest = hashlib.blake2b(str(size).encode(), digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        for block in chosen:
            file.seek(block * BLOCK)
            digest.update(file.read(min(BLOCK, size - block * BLOCK)))
    return digest.digest()


def check_file(path: Path) -> Path:
    """Return the path of a file.

    Raises:
        FileNotFoundError: If there is none.
        IsADirectoryError: If it is a folder; the message names the pattern of its files.
    """
    if path.is_dir():
        kinds = [file.suffix for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
        pattern = path / f"*{max(kinds or SUFFIXES, key=kinds.count)}"
        beir = "; it is a collection in BEIR layout" if (path / "corpus.jsonl").is_file() else ""
        raise IsADirectoryError(
            f"{path}: is a folder{beir}, expected a file. To fix, name its files, e.g. {pattern}"
            f"{', or give it as kind beir or --retrieval' if beir else ''}."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. To fix, check the path; it is relative to {Path.cwd()}."
        )
    return path


def choose_lines(path: Path, lines: str | None) -> tuple[range, int]:
    """The numbers from 1 of the lines that a slice chooses, and how many lines the file has.

    Args:
        lines: ``first:last`` as Python slices a list: ``:-400`` are all but the last 400 lines, and
            ``-400:`` the last 400; ``None`` for all.

    Raises:
        ValueError: If it is no slice, or chooses no line.
    """
    count = sum(1 for _ in read_lines(path, errors="surrogateescape"))
    if lines is None:
        return range(1, count + 1), count
    first, last = (int(part) if part else None for part in check_slice(lines).split(":"))
    chosen = range(1, count + 1)[first:last]
    if not chosen:
        raise ValueError(
            f"{path}: has {count:,} lines, and lines '{lines}' are none of them. To fix, choose "
            f"others."
        )
    return chosen, count


def read_lines(
    path: Path,
    bad: BadRows | None = None,
    errors: str = "strict",
    chosen: Container[int] | None = None,
) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file, plain or ``.gz``, each with its number from 1.

    Args:
        chosen: Numbers of the lines to read; ``None`` for all.
        errors: ``surrogateescape`` leaves such a line to the caller's :func:`check_unicode`: a line
            of a CSV file may be the middle of a row.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not UTF-8, or the archive is damaged.
    """
    bad = bad or BadRows()
    check_file(path)
    line = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for line, content in enumerate(file, start=1):
                if chosen is not None and line not in chosen:
                    continue
                text = bad.attempt(_decode, content, f"{path}:{line}", line == 1, errors)
                if text is not None:
                    yield line, text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}:{line + 1}: the archive is damaged or cut off ({error}). To fix, copy it "
                f"again."
            ) from None


def _decode(content: bytes, where: str, first: bool, errors: str) -> str:
    try:
        return content.decode("utf-8-sig" if first else "utf-8", errors)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not UTF-8. To fix, convert the file.") from None


def parse_row(content: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with the given keys."""
    try:
        row = json.loads(content)
    except RecursionError:
        raise ValueError(
            f"{where}: is not JSON (nested too deeply). To fix, correct or remove the line."
        ) from None
    except ValueError as error:  # also of a number with thousands of digits
        reason = getattr(error, "msg", str(error))
        raise ValueError(
            f"{where}: is not JSON ({reason}). To fix, correct or remove the line."
        ) from None
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        found = f", it has {', '.join(map(repr, row))[:200]}" if isinstance(row, dict) else ""
        raise ValueError(f"{where}: lacks {', '.join(missing)}{found}. To fix, add the keys.")
    return row


def text_key(text: str) -> int:
    """64 bits by which a text is known, whatever its case and its spaces are."""
    same = " ".join(text.split()).casefold().encode("utf-8")
    return int.from_bytes(hashlib.blake2b(same, digest_size=8).digest(), "little")


def check_text(value: Any, what: str) -> str:
    """Check that a value is a text that a model can read: not empty, and valid Unicode."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is empty or no text. To fix, correct or remove the line.")
    check_unicode(value, what)
    return value


def check_unicode(text: str, what: str) -> None:
    """Refuse text that no tokenizer accepts: JSON can spell half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} is not UTF-8, or holds half of a surrogate pair. To fix, correct or remove "
            f"the line."
        ) from None


def csv_cells(path: Path, bad: BadRows) -> CellRows:
    """Cells between commas; a row may span lines."""
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


def tsv_cells(path: Path, bad: BadRows) -> CellRows:
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
