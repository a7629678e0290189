"""Rows of a collection in BEIR layout."""

import json
import re
from pathlib import Path

import pytest

from bge_pruning.datasets.mteb_dataloader import read_beir, read_corpus
from bge_pruning.datasets.rows import BadRows, Row

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "They sleep."},
    {"_id": "d2", "title": "", "text": "Hunde bellen."},
    {"_id": "d3", "title": "Birds", "text": "They sing."},
    {"_id": "4", "text": "鱼会游泳。"},
]
QUERIES = [{"_id": "q1", "text": "who sleeps?"}, {"_id": "q2", "text": "wer bellt?"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t2\nq1\td3\t0\nq1\t4\t1\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, rows in (("corpus", CORPUS), ("queries", QUERIES)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text(QRELS, encoding="utf-8")
    return tmp_path


def test_rows_are_the_judged_queries(folder):
    assert list(read_beir(folder)) == [
        Row("wer bellt?", ("Hunde bellen.",), 1),
        Row("who sleeps?", ("Cats They sleep.", "鱼会游泳。", "Birds They sing."), 2),
    ]


def test_another_split_without_a_header_and_with_a_query_that_has_no_positive(folder):
    (folder / "qrels" / "dev.tsv").write_text("q1\td1\t1\r\n\r\nq2\td2\t0\r\n")
    assert [row.text for row in read_beir(folder, "dev")] == ["who sleeps?"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "qrels/train.tsv",
            QRELS + "q1\td9\t1\n",
            "train.tsv:6: corpus-id 'd9' is not in the corpus",
        ),
        (
            "qrels/train.tsv",
            QRELS + "q9\td1\t1\n",
            "train.tsv:6: query-id 'q9' is not among the queries",
        ),
        ("qrels/train.tsv", QRELS + "q1 d1 1\n", "train.tsv:6: has 1 columns, expected query-id"),
        ("qrels/train.tsv", QRELS + "q1\td1\tx\n", "train.tsv:6: score 'x' is not a whole number"),
        (
            "qrels/train.tsv",
            QRELS + "q2\td2\t0\n",
            "train.tsv:6: judges corpus-id 'd2' otherwise than",
        ),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}',
            "corpus.jsonl:2: _id 'd1' has another text in an earlier line",
        ),
        ("corpus.jsonl", '{"_id": "d1", "text": "a", "title": 3}', "corpus.jsonl:1: text or title"),
        ("corpus.jsonl", "{", "corpus.jsonl:1: is not JSON ("),
        ("corpus.jsonl", "[1]", "corpus.jsonl:1: lacks _id, text"),
        ("corpus.jsonl", '{"_id": "d1"}', "corpus.jsonl:1: lacks text"),
        (
            "corpus.jsonl",
            '\n{"_id": "d1", "text": " "}',
            "corpus.jsonl:2: text is empty or no text",
        ),
        ("queries.jsonl", '{"_id": "q1", "text": 3}', "queries.jsonl:1: text or title is no text"),
        ("queries.jsonl", b"\xff", "queries.jsonl:1: is not UTF-8"),
    ],
)
def test_errors_name_file_and_line(name, content, message, folder):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*To fix"):
        list(read_beir(folder))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
def test_missing_files(name, folder):
    (folder / name).unlink()
    message = rf"{name}: no such file\. To fix, check the path"
    with pytest.raises(FileNotFoundError, match=message):
        list(read_beir(folder))


def test_no_query_with_a_positive_is_no_row(folder):
    (folder / "qrels" / "train.tsv").write_text("q1\td1\t0\n")
    assert list(read_beir(folder)) == []


def test_the_same_judgement_twice_is_one(folder):
    (folder / "qrels" / "train.tsv").write_text(QRELS + "q2\td2\t1\n")
    assert len(list(read_beir(folder))) == 2


def test_every_passage_is_read(folder):
    texts = [row.text for row in read_corpus(folder)]
    assert texts == ["Cats They sleep.", "Hunde bellen.", "Birds They sing.", "鱼会游泳。"]


def test_wrong_lines_are_skipped_and_counted(folder):
    (folder / "qrels" / "train.tsv").write_text(QRELS + "q1\n" + "q9\td1\t1\n")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("{\n")
    bad = BadRows(skip=True)
    assert len(list(read_beir(folder, bad=bad))) == 2
    assert bad.count == 3
    assert len(list(read_corpus(folder, bad))) == 4
    assert bad.count == 4
