import pytest
from markdown_it import MarkdownIt

from bge_pruning.reports.markdown import escape, fence, heading, paragraph, picture, table, warning

NASTY = ["a|b", "<script>alert(1)</script>", "[x](http://a.b)", "![x](http://a.b/c.png)"]
NASTY += ["*a* _b_ `c` ~~d~~", "&lt; & &amp;", "C#  #", r"back\slash", "a_b c_d", "_a_", "$x$"]
NASTY += ["", "模型 модель"]


def shown(markdown: str) -> str:
    """What a reader sees of a page."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tokens = [child for token in parser.parse(markdown) for child in token.children or []]
    assert {token.type for token in tokens} <= {"text", "text_special", "softbreak"}
    return "".join(token.content for token in tokens)


@pytest.mark.parametrize("text", NASTY)
def test_text_stays_what_it_is(text):
    expected = " ".join(text.split())
    assert shown(f"On {escape(text)} it scores") == f"On {expected} it scores"
    assert shown(f"# A {escape(text)}") == f"A {expected}".rstrip()
    rows = [[text, 1], ["b", 2]]
    assert shown(table(["name", text], rows)) == f"name{expected}{expected}1b2"


def test_lines_are_joined_numbers_to_the_right_and_other_blocks():
    assert escape("a\n# b\r\n\tc") == "a \\# b c"
    assert escape("stsb-en_test (dense+sparse), 2.0") == "stsb-en_test (dense+sparse), 2.0"
    assert table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert picture("a [b]", "c.png") == r"![a \[b\]](c.png)"
    assert heading("a [b]") == r"### a \[b\]"
    assert paragraph("a [b]") == r"a \[b\]" and paragraph("a [b]").content == {"text": "a [b]"}
    assert warning("a [b]", "*c*") == r"> **a \[b\]** \*c\*"


@pytest.mark.parametrize("text", ["a", "a\n```\nb", "`````", "", "echo `x` | y"])
def test_code_cannot_end_its_block(text):
    tokens = MarkdownIt().parse(fence(text, "bash") + "\n\nafter")
    assert tokens[0].type == "fence"
    assert tokens[0].content.rstrip("\n") == text
    assert tokens[0].info == "bash"
