"""Pieces of Markdown whose content comes from data: escaped, so that it stays what it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# What Markdown or HTML would read as more than text. An underscore inside a word is only text.
SPECIAL = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])")


def escape(text: object) -> str:
    """Text as a line of Markdown that shows it."""
    return SPECIAL.sub(lambda match: "\\" + match[0], " ".join(str(text).split()))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """A table, its cells escaped.

    Args:
        header: Names of the columns.
        rows: Cells.
        words: Columns at the left that hold words; the others hold numbers, to the right.
    """
    lines = [[escape(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * words + ["---:"] * (len(header) - words))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fence(text: str, language: str) -> str:
    """A block of code; what is in it cannot end it."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    mark = "`" * (longest + 1)
    return f"{mark}{language}\n{text.rstrip()}\n{mark}"


def picture(caption: str, name: str) -> str:
    """A picture that lies beside the page."""
    return f"![{escape(caption)}]({name})"
