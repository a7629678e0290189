"""Sources as memory-mapped arrays, read once and kept."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bge_pruning.datasets import text_corpus
from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.text_corpus import (
    FORMAT,
    cached_corpus,
    corpus_key,
    load_corpus,
    number_texts,
)

ROWS = [
    Row("the man", ("a dog", "the cat", "a park"), 2, (3.0, 2.0, 1.0)),
    Row("a dog"),
    Row("a child", ("the man",), scores=(0.5,)),
]
TEXTS = ["the man", "a dog", "the cat", "a park", "a child"]


class Reader:
    """Yields rows, and counts how often it was asked to."""

    def __init__(self, rows: list[Row | str]) -> None:
        self.rows = rows
        self.calls = 0

    def __call__(self, bad: BadRows) -> Iterator[Row]:
        self.calls += 1
        for row in self.rows:
            with bad.guard():
                if isinstance(row, str):
                    raise ValueError(row)
            if isinstance(row, Row):
                yield row


def test_texts_are_numbered_in_order_and_once():
    table = number_texts(ROWS)
    assert [TEXTS[i] for i in table.texts] == [t for r in ROWS for t in (r.text, *r.others)]
    assert table.starts.tolist() == [0, 4, 5, 7]
    assert table.positives.tolist() == [2, 0, 0]
    assert table.scores[1:4].tolist() == [3.0, 2.0, 1.0]
    assert table.scores[6] == 0.5
    assert np.isnan(table.scores[[0, 4, 5]]).all()
    assert len(number_texts([])) == 0


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_corpus_is_read_twice_and_then_never(chunk, tmp_path, tokenizer_json, monkeypatch):
    monkeypatch.setattr(text_corpus, "CHUNK", chunk)
    reader = Reader(ROWS)
    arguments = (tmp_path / "c", "mine", reader, tokenizer_json, 128, False)
    first, again = cached_corpus(*arguments), cached_corpus(*arguments)
    assert reader.calls == 2
    expected = tokenize(TEXTS, build_tokenizer(tokenizer_json, 128))
    for corpus in (first, again):
        assert len(corpus.texts) == 5
        for index in range(5):
            assert corpus.texts[index].tolist() == expected[index].tolist()
        for name in ("texts", "starts", "positives", "scores"):
            a, b = (getattr(table, name) for table in (corpus.rows, number_texts(ROWS)))
            assert np.array_equal(a, b, equal_nan=True)
    assert isinstance(first.texts.ids, np.memmap)
    assert isinstance(first.rows.texts, np.memmap)


def test_two_that_need_a_corpus_at_once_make_it_once(tmp_path, tokenizer_json):
    class Slow(Reader):
        def __call__(self, bad):
            time.sleep(0.05)
            return super().__call__(bad)

    reader = Slow(ROWS)
    arguments = (tmp_path / "c", "mine", reader, tokenizer_json, 128, False)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(lambda _: cached_corpus(*arguments), range(3)))) == 3
    assert reader.calls == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_truncated_texts_are_counted(tmp_path, tokenizer_json):
    corpus = cached_corpus(tmp_path / "c", "mine", Reader(ROWS), tokenizer_json, 3, False)
    assert corpus.texts.lengths.max() == 3
    assert corpus.texts.truncated == load_corpus(tmp_path / "c").texts.truncated > 0


def test_a_wrong_row_and_no_rows_leave_nothing(tmp_path, tokenizer_json):
    reader = Reader([*ROWS, "x:4: wrong"])
    with pytest.raises(ValueError, match="x:4: wrong"):
        cached_corpus(tmp_path / "c", "mine", reader, tokenizer_json, 128, False)
    assert reader.calls == 1  # before any text is tokenised
    for rows in ([], ["x:1: wrong"]):
        with pytest.raises(ValueError, match=r"^mine: holds no rows. To fix, choose another file"):
            cached_corpus(tmp_path / "c", "mine", Reader(rows), tokenizer_json, 128, True)
    assert not list(tmp_path.iterdir())


def test_skipped_rows_are_remembered(tmp_path, tokenizer_json):
    rows = [ROWS[0], "x:2: wrong", *ROWS[1:]]
    arguments = (tmp_path / "c", "mine", Reader(rows), tokenizer_json, 128, True)
    for corpus in (cached_corpus(*arguments), cached_corpus(*arguments)):
        assert (corpus.bad.count, corpus.bad.examples) == (1, ["x:2: wrong"])
        assert len(corpus.rows) == 3
    record = json.loads((tmp_path / "c" / "corpus.json").read_text())
    assert record["source"] == "mine"
    assert record["bad"] == {"skip": True, "count": 1, "examples": ["x:2: wrong"], "notes": []}


@pytest.mark.parametrize("name", ["ids.int32", "texts.npy", "starts.npy", "corpus.json"])
@pytest.mark.parametrize("damage", ["cut", "removed", "flipped"])
def test_a_damaged_cache_says_so(name, damage, tmp_path, tokenizer_json):
    cached_corpus(tmp_path / "c", "mine", Reader(ROWS), tokenizer_json, 128, False)
    path = tmp_path / "c" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":  # of the right size, and no error of any reader
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    found = rf"c(/{name}: |: damaged or not complete ).*To fix, delete the folder; it is made again"
    with pytest.raises((ValueError, FileNotFoundError), match=found):
        load_corpus(tmp_path / "c")


def test_a_cache_of_another_version_says_so(tmp_path, tokenizer_json):
    cached_corpus(tmp_path / "c", "mine", Reader(ROWS), tokenizer_json, 128, False)
    record = tmp_path / "c" / "corpus.json"
    record.write_text(record.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(ValueError, match=r"c: .*it is of version 1, expected .* To fix, delete"):
        load_corpus(tmp_path / "c")
    record.write_text(record.read_text().replace('"count": 0', '"count": "a"'))
    message = r'json: bad.count is "a", expected a whole .* To fix, del'
    with pytest.raises(ValueError, match=message):
        load_corpus(tmp_path / "c")


def test_keys_follow_all_parts():
    keys = {corpus_key("a", 1), corpus_key("a", 2), corpus_key("b", 1), corpus_key("a", "1")}
    assert len(keys) == 4
    assert all(re.fullmatch("[0-9a-f]{24}", key) for key in keys)


MEASURE = """
import resource, sys
from bge_pruning.datasets.rows import Row
from bge_pruning.datasets.text_corpus import number_texts
import pyarrow
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = number_texts(Row(f"query {i}", (f"passage {i % 1000}",), 1) for i in range(400_000))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(table), after - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_of_a_row_is_a_few_numbers():
    """Strings alone would take 60 bytes a text and more, and a table of them twice that."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=root, check=True
    )
    rows, kib = map(int, run.stdout.split())
    assert rows == 400_000
    assert kib * 1024 / rows < 250
