"""Lines and rows of text files; what is said about wrong ones is tested with their readers."""

import gzip
import re

import pytest

from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.sts_dataloader import read_sts, read_texts
from bge_pruning.datasets.text_files import (
    check_unicode,
    expand_paths,
    hash_file,
    parse_row,
    read_lines,
)

CONTENT = "\ufeffeins\r\nzwei\u2028halb\n狗"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_lines_end_at_line_feeds_only_and_are_counted(name, write):
    expected = [(1, "eins\r\n"), (2, "zwei\u2028halb\n"), (3, "狗")]
    assert list(read_lines(write(CONTENT, name))) == expected


def test_a_row_needs_its_keys_and_whole_characters():
    assert parse_row('{"a": 1, "b": 2}', "x:1", ("a",)) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match=r"^x:1: lacks c, it has 'a'\. To fix, add the keys\.$"):
        parse_row('{"a": 1}', "x:1", ("a", "c"))
    with pytest.raises(ValueError, match="^x:1: is not JSON"):
        parse_row("[" * 100_000, "x:1", ())
    check_unicode("\U0001f408", "x:1")
    message = r"^x:1: text is not UTF-8, or holds half of a surrogate pair.*To fix"
    with pytest.raises(ValueError, match=message):
        check_unicode("\ud83d", "x:1: text")


def test_lines_that_are_not_utf8_are_skipped_and_counted(write):
    path = write(b"a\n\xff\nb\n", "a.txt")
    bad = BadRows(skip=True)
    assert list(read_lines(path, bad)) == [(1, "a\n"), (3, "b\n")]
    assert bad.examples == [f"{path}:2: is not UTF-8. To fix, convert the file."]


def test_paths_with_wildcards(tmp_path):
    for name in ("b.txt", "a.txt", "c.csv", "d[1].txt"):
        (tmp_path / name).touch()
    assert [p.name for p in expand_paths(f"{tmp_path}/?.txt")] == ["a.txt", "b.txt"]
    assert [p.name for p in expand_paths(f"{tmp_path}/d[1].txt")] == ["d[1].txt"]
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such file. To fix, check the path"):
        expand_paths(f"{tmp_path}/none.txt")
    with pytest.raises(FileNotFoundError, match=r"\*.tsv: fits no file. To fix, check the pattern"):
        expand_paths(f"{tmp_path}/*.tsv")


def test_hash_of_a_file(write, tmp_path):
    assert hash_file(write(b"abc", "a")).startswith("ba7816bf8f01cfea")
    with pytest.raises(FileNotFoundError, match="no such file"):
        hash_file(tmp_path / "b")


def test_damaged_archives(tmp_path):
    path, whole = tmp_path / "a.txt.gz", gzip.compress(bytes(range(256)) * 500)
    cut_off = [whole[: int(kept * len(whole))] for kept in (0.5, 0.95)]
    for content in (*cut_off, whole[:15] + b"x" * 45 + whole[60:], b"no archive"):
        path.write_bytes(content)
        message = r"a.txt.gz:\d+: the archive is damaged or cut off \(.*To fix, copy it again"
        with pytest.raises(ValueError, match=message):
            list(read_lines(path, errors="surrogateescape"))


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ((), "*.txt"),
        (("README.md", "a.csv", "b.csv", "c.txt"), "*.csv"),
        (("a.txt.gz",), "*.gz"),
    ],
)
def test_a_folder_in_place_of_a_file_names_its_pattern(names, pattern, tmp_path):
    (tmp_path / "inside").mkdir()
    for name in names:
        (tmp_path / name).touch()
    message = (
        f"^{re.escape(f'{tmp_path}: is a folder, expected a file. To fix, name its files, e')}"
    )
    for read in (
        expand_paths,
        read_sts,
        lambda path: read_texts([path]),
        lambda p: hash_file(tmp_path),
    ):
        with pytest.raises(IsADirectoryError, match=message) as caught:
            read(str(tmp_path))
    assert str(caught.value).endswith(f"e.g. {tmp_path / pattern}.")
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(
        IsADirectoryError, match="it is a collection in BEIR layout.* kind beir or "
    ):
        expand_paths(str(tmp_path))
    (tmp_path / "inside.d").mkdir()
    with pytest.raises(FileNotFoundError, match="fits no file"):
        expand_paths(f"{tmp_path}/*.d")  # folders are not texts
