"""Blocks of a page: as a text each is Markdown, and templates make HTML of its content."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What Markdown or HTML would read as more than text. An underscore inside a word is only text.
SPECIAL = re.compile(r"[\\`*\[\]<>&|~$#]|(?<![^\W_])_|_(?![^\W_])")


class Block(str):
    """Markdown that remembers what it shows: ``content``, by the names of the arguments, unescaped.

    ``kind`` is ``paragraph``, ``table``, ``heading``, ``warning``, ``code`` or ``picture``.
    """

    kind: str
    content: dict[str, object]

    def __new__(cls, markdown: str, kind: str, **content: object) -> Block:
        """Make a block from its Markdown, its kind and what it shows."""
        block = super().__new__(cls, markdown)
        block.kind, block.content = kind, content
        return block


def escape(text: object) -> str:
    """Escape a text, so that a line of Markdown shows it as it is."""
    return SPECIAL.sub(lambda match: "\\" + match[0], " ".join(str(text).split()))


def paragraph(text: str) -> Block:
    """Words without any formatting, escaped."""
    return Block(escape(text), "paragraph", text=text)


def heading(text: str) -> Block:
    """A heading inside a section."""
    return Block(f"### {escape(text)}", "heading", text=text)


def warning(claim: str, text: str) -> Block:
    """A claim that nobody should miss, and what it means."""
    return Block(f"> **{escape(claim)}** {escape(text)}", "warning", claim=claim, text=text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> Block:
    """A table, its cells escaped; the first ``words`` columns hold words, all others numbers."""
    lines = [[escape(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * words + ["---:"] * (len(header) - words))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return Block(text, "table", header=header, rows=rows, words=words)


def fence(text: str, language: str) -> Block:
    """A block of code, fenced so that its content cannot end it."""
    text = text.rstrip()
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    mark = "`" * (longest + 1)
    return Block(f"{mark}{language}\n{text}\n{mark}", "code", text=text, language=language)


def picture(caption: str, name: str) -> Block:
    """A picture that lies beside the page."""
    return Block(f"![{escape(caption)}]({name})", "picture", caption=caption, name=name)
