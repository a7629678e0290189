"""``report.html`` from the text of ``report.md``: one file that needs nothing else.

Text is escaped by the renderer; raw HTML, links and pictures from elsewhere stay text. Each picture
is there twice, for light and for dark pages.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from bge_pruning.reports.report_pictures import Picture
from bge_pruning.reports.report_style import STYLE

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""
WIDTH = re.compile(r'<svg [^>]*?width="([\d.]+pt)"')
PATH_DATA = re.compile(r'(?<= d=")[^"]+')
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def render_html(markdown: str, pictures: Mapping[str, Picture]) -> str:
    """Renders a report.

    Args:
        markdown: Text of ``report.md``.
        pictures: Under the names that the text uses.

    Returns:
        A page of its own.
    """
    renderer = _renderer(pictures)
    tokens = renderer.parse(markdown)
    headings = _name_headings(tokens)
    _name_containers(tokens)
    start = next((n for n, token in enumerate(tokens) if _opens(token, "h2")), len(tokens))
    parts = [
        renderer.renderer.render(tokens[:start], renderer.options, {}),
        _contents(headings),
        renderer.renderer.render(tokens[start:], renderer.options, {}),
    ]
    title = next((_text(tokens[n + 1]) for n, t in enumerate(tokens) if _opens(t, "h1")), "Report")
    return PAGE.format(title=escape(title), style=STYLE, body="".join(parts))


def _renderer(pictures: Mapping[str, Picture]) -> MarkdownIt:
    """Markdown with tables, and our own pictures, tables and code."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    renderer.disable(["link", "autolink", "reference"])  # a report has none, so data cannot either

    def image(self: object, tokens: Sequence[Token], index: int, *_: object) -> str:
        token = tokens[index]
        return _picture(token.content, pictures.get(str(token.attrGet("src"))))

    def fence(self: object, tokens: Sequence[Token], index: int, *_: object) -> str:
        return _code(tokens[index])

    def table_open(self: object, tokens: Sequence[Token], index: int, *_: object) -> str:
        return f'<div class="{tokens[index].attrGet("class")}" tabindex="0"><table>\n'

    def table_close(*_: object) -> str:
        return "</table></div>\n"

    renderer.add_render_rule("image", image)
    renderer.add_render_rule("table_open", table_open)
    renderer.add_render_rule("table_close", table_close)
    renderer.add_render_rule("fence", fence)
    return renderer


def _picture(caption: str, picture: Picture | None) -> str:
    """Both versions of a picture; one that is not ours is only its caption."""
    if picture is None:
        return escape(caption)
    light, dark = _data_uri(picture.light), _data_uri(picture.dark)
    width = WIDTH.search(picture.light)
    # On a narrow screen it scrolls: shrunk to the screen it could not be read.
    style = f' style="--width: {width[1]}"' if width else ""
    # Paper is white whatever the screen is.
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(caption)}"{style}></picture>'
    )


def _data_uri(svg: str) -> str:
    short = PATH_DATA.sub(lambda path: LONG_NUMBER.sub(_round, path[0]), svg)
    return "data:image/svg+xml;base64," + base64.b64encode(short.encode()).decode()


def _round(number: re.Match[str]) -> str:
    """A hundredth of a point is not seen; it makes the file a third smaller."""
    return f"{float(number[0]):.2f}"


def _code(token: Token) -> str:
    """Code in a box; a configuration is folded away."""
    block = f"<pre><code>{escape(token.content)}</code></pre>\n"
    if token.info != "yaml":
        return block
    lines = token.content.count("\n")
    return f"<details><summary>Show all {lines} lines</summary>\n{block}</details>\n"


def _opens(token: Token, tag: str) -> bool:
    return token.type == "heading_open" and token.tag == tag


def _text(inline: Token) -> str:
    """The words of a heading, without Markdown's marks."""
    return "".join(child.content for child in inline.children or [])


def _name_headings(tokens: Sequence[Token]) -> dict[str, str]:
    """Gives the sections an ``id`` each, and returns their headings under it."""
    headings: dict[str, str] = {}
    for index, token in enumerate(tokens):
        if _opens(token, "h2"):
            text = _text(tokens[index + 1])
            name = re.sub(r"\W+", "-", text.lower()).strip("-") or "section"
            name += f"-{len(headings)}" if name in headings else ""
            token.attrSet("id", name)
            headings[name] = text
    return headings


def _name_containers(tokens: Sequence[Token]) -> None:
    """A box of its own for each table and each picture, so that only the box scrolls."""
    before_sections = True
    for index, token in enumerate(tokens):
        before_sections = before_sections and not _opens(token, "h2")
        if token.type == "table_open":
            token.attrSet("class", "tiles" if before_sections else "scroll")
        if token.type == "inline" and [c.type for c in token.children or []] == ["image"]:
            for paragraph in (tokens[index - 1], tokens[index + 1]):
                paragraph.tag = "figure"
            tokens[index - 1].attrSet("tabindex", "0")


def _contents(headings: Mapping[str, str]) -> str:
    items = "".join(
        f'<li><a href="#{name}">{escape(text)}</a></li>' for name, text in headings.items()
    )
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>\n' if items else ""
