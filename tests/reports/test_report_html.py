"""The page against a parser of HTML: what it holds, what it asks for, what stays text."""

import base64
import re
from html.parser import HTMLParser

import pytest

from bge_pruning.reports.markdown import escape, fence, table
from bge_pruning.reports.report_html import render_html
from bge_pruning.reports.report_pictures import CAPTIONS, Picture
from bge_pruning.reports.report_sections import render_sections

VOID = {"meta", "img", "source", "br", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def picture():
    return Picture(None, "<svg>light</svg>", "<svg>dark</svg>")


@pytest.fixture
def page(inputs, picture):
    pictures = dict.fromkeys(CAPTIONS, picture)
    text = "\n\n".join(render_sections(inputs, pictures)) + "\n"
    return text, Page(render_html(text, pictures))


def test_the_page_says_what_the_markdown_says(page):
    markdown, html = page
    for line in markdown.splitlines():
        for cell in line.split("|"):
            words = re.sub(r"[*>#`]|\\(.)", r"\1", cell).strip()
            if words and not re.match(r"!\[|-+:?$|bash$|yaml$", words):
                assert words in html.text, line


def test_sections_are_listed_and_can_be_reached(page):
    markdown, html = page
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    names = [attributes["id"] for attributes in html.all("h2")]
    assert len(headings) == len(names) == len(set(names))
    assert [attributes["href"] for attributes in html.all("a")] == [f"#{name}" for name in names]


def test_two_sections_of_one_name_can_both_be_reached():
    html = Page(render_html("## A b\n\n## A b\n\n## !\n", {}))
    assert [attributes["id"] for attributes in html.all("h2")] == ["a-b", "a-b-1", "section"]


def test_nothing_is_asked_of_the_network(page):
    _, html = page
    for tag, attributes in html.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/svg+xml;base64,", "#"))
        assert not any(name.startswith("on") for name in attributes)
    style = html.text.split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_every_picture_is_there_for_light_and_dark_pages_and_has_words(page):
    _, html = page
    images, sources = html.all("img"), html.all("source")
    assert {image["alt"] for image in images} == set(CAPTIONS.values())
    assert len(sources) == len(images)
    for image, source in zip(images, sources, strict=True):
        assert source["media"] == "screen and (prefers-color-scheme: dark)"
        light, dark = (
            base64.b64decode(uri.partition(",")[2]).decode()
            for uri in (image["src"], source["srcset"])
        )
        assert (light, dark) == ("<svg>light</svg>", "<svg>dark</svg>")


def test_a_picture_stands_in_a_box_of_its_own(picture):
    html = Page(render_html("![words](a.png)\n", {"a.png": picture}))
    assert html.all("figure") == [{"tabindex": "0"}]
    assert html.all("p") == []


def test_a_picture_is_not_shrunk_below_what_can_be_read():
    svg = '<svg height="1pt" width="432.5pt" viewBox="0 0 1 1"><g width="7pt"/></svg>'
    html = Page(render_html("![a](a.png)", {"a.png": Picture(None, svg, svg)}))
    assert html.all("img")[0]["style"] == "--width: 432.5pt"


def test_paths_are_rounded_and_the_rest_is_not():
    svg = '<svg><path d="M 1.23456 -0.98765"/><g transform="scale(0.015625)"/></svg>'
    html = Page(render_html("![a](a.png)", {"a.png": Picture(None, svg, svg)}))
    drawn = base64.b64decode(html.all("img")[0]["src"].partition(",")[2]).decode()
    assert drawn == '<svg><path d="M 1.23 -0.99"/><g transform="scale(0.015625)"/></svg>'


def test_wide_tables_scroll_and_the_first_one_is_a_row_of_tiles():
    text = f"# T\n\n{table(['a', 'b'], [['x', 1]])}\n\n## S\n\n{table(['a'], [['y']])}\n"
    html = Page(render_html(text, {}))
    assert [box["class"] for box in html.all("div")] == ["tiles", "scroll"]
    assert {"style": "text-align:right"} in html.all("td")


def test_a_configuration_is_folded_and_commands_are_not():
    html = Page(render_html(f"{fence('a: 1', 'yaml')}\n\n{fence('make', 'bash')}\n", {}))
    assert len(html.all("details")) == 1 and len(html.all("pre")) == 2
    assert "Show all 1 lines" in html.text


# What comes from data stays text

NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a & b &lt; c",
    "![x](http://a.b/c.png)",
    "[x](javascript:alert(1))",
    "<http://a.b>",
    "a|b",
    "{title} %s",
    "模型",
)


@pytest.mark.parametrize("name", NASTY)
def test_names_commands_and_configurations(name, picture):
    text = f"# {escape(name)}\n\n{table([name], [[name]])}\n\n{fence(name, 'bash')}\n\n"
    html = Page(render_html(text + fence(name, "yaml"), {"a.png": picture}))
    assert html.text.count(name) == 6  # the title and the heading, two cells, two blocks
    assert not {tag for tag, _ in html.tags} & {"script", "img", "a"}


@pytest.mark.parametrize("name", NASTY)
def test_names_that_were_not_escaped(name, picture):
    """A table of another module may hold one."""
    html = Page(render_html(f"| a |\n| --- |\n| {name} |\n\nOn {name}: 1.\n", {"a.png": picture}))
    assert not {tag for tag, _ in html.tags} & {"script", "img", "a"}


def test_a_page_without_anything():
    html = Page(render_html("", {}))
    assert html.all("nav") == [] and "Report" in html.text


def test_it_does_not_depend_on_the_order_of_calls(picture):
    text = "# A\n\n![a](a.png)\n"
    first = render_html(text, {"a.png": picture})
    render_html(text, {})
    assert render_html(text, {"a.png": picture}) == first
