"""Lines and rows of text files; what is said about wrong ones is tested with their readers."""

import gzip

import pytest

from bge_pruning.datasets.text_files import check_unicode, parse_row, read_lines

CONTENT = "\ufeffeins\r\nzwei\u2028halb\n狗"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_end_at_line_feeds_only_and_are_counted(name, tmp_path):
    path = tmp_path / name
    data = CONTENT.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    expected = [(1, "eins\r\n"), (2, "zwei\u2028halb\n"), (3, "狗")]
    assert list(read_lines(path)) == expected


def test_a_row_needs_its_keys():
    assert parse_row('{"a": 1, "b": 2}', "x:1", ("a",)) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match=r"^x:1: lacks c\. To fix, add the keys\.$"):
        parse_row('{"a": 1}', "x:1", ("a", "c"))


def test_half_a_character():
    check_unicode("\U0001f408", "x:1")
    with pytest.raises(ValueError, match=r"^x:1: text is not valid Unicode .*To fix"):
        check_unicode("\ud83d", "x:1: text")
