"""Reading text files line by line, with errors that name file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file, plain or ``.gz``, each with its number from 1.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not UTF-8, or the archive is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. To fix, check the path; it is relative to {Path.cwd()}."
        )
    line = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for line, content in enumerate(file, start=1):
                yield line, content.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{line}: is not UTF-8. To fix, convert the file.") from None
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}:{line + 1}: the archive is damaged or cut off ({error}). To fix, copy it "
                f"again."
            ) from None


def parse_row(content: str, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with the given keys.

    Args:
        content: One line.
        where: File and line, for the message.
        keys: Keys that it must have.

    Raises:
        ValueError: If it is no JSON, or lacks a key.
    """
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: is not JSON ({error.msg}). To fix, correct or remove the line."
        ) from None
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}. To fix, add the keys.")
    return row


def check_unicode(text: str, what: str) -> None:
    """Refuse what no tokenizer takes: JSON can spell half of a character.

    Raises:
        ValueError: If the text holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{what} is not valid Unicode (half of a surrogate pair). To fix, correct or remove "
            f"the line."
        ) from None
