"""Rows of collections in BEIR layout, and of mteb tasks by name."""

import json
import logging
import re
from pathlib import Path

import datasets
import mteb
import pytest
from mteb.abstasks import AbsTaskRetrieval

from bge_pruning.datasets.mteb_dataloader import (
    mteb_fingerprint,
    read_beir,
    read_corpus,
    read_mteb,
    read_mteb_corpus,
)
from bge_pruning.datasets.mteb_tasks import load_split
from bge_pruning.datasets.rows import BadRows, Row

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "They sleep. "},
    {"_id": "d2", "title": "", "text": " Hunde bellen."},
    {"_id": "d3", "title": "Birds", "text": "They sing."},
    {"_id": "4", "title": "", "text": "鱼会游泳。"},
    {"_id": "d5", "title": "Nobody", "text": "judged this."},
]
QUERIES = [{"_id": "q1", "text": "who sleeps?"}, {"_id": "q2", "text": "wer bellt?"}]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t2\nq1\td3\t0\nq1\t4\t1\n"
ROWS = [
    Row("wer bellt?", ("Hunde bellen.",), 1),
    Row("who sleeps?", ("Cats They sleep.", "鱼会游泳。", "Birds They sing."), 2),
]
PASSAGES = [
    "Cats They sleep.",
    "Hunde bellen.",
    "Birds They sing.",
    "鱼会游泳。",
    "Nobody judged this.",
]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.jsonl").write_text(jsonl(CORPUS))
    (tmp_path / "queries.jsonl").write_text(jsonl(QUERIES))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text(QRELS, encoding="utf-8")
    return tmp_path


def test_rows_are_the_judged_queries(folder):
    assert list(read_beir(folder)) == ROWS


def test_another_split_without_a_header_and_with_a_query_that_has_no_positive(folder, caplog):
    path = folder / "qrels" / "dev.tsv"
    path.write_text("q1\td1\t1\r\n\r\nq2\td2\t0\r\n")
    bad = BadRows()
    with caplog.at_level(logging.INFO):
        assert [row.text for row in read_beir(folder, "dev", bad)] == ["who sleeps?"]
    assert f"{path}: 1 of 2 queries have no positive" in caplog.text
    assert bad.count == 0


def test_a_judgement_and_a_passage_may_be_listed_twice(folder):
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q1\td1\t2\n")
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(jsonl(CORPUS[:1]))
    assert list(read_beir(folder)) == ROWS


def test_all_passages(folder):
    assert list(read_corpus(folder)) == [Row(text) for text in PASSAGES]


def test_an_instruction_is_written_after_the_query(folder):
    rows = [{**row, "instruction": "answer"} for row in QUERIES]
    (folder / "queries.jsonl").write_text(jsonl(rows))
    assert [row.text for row in read_beir(folder)] == ["wer bellt? answer", "who sleeps? answer"]


OTHER_TEXT = '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "qrels/train.tsv",
            QRELS + "q1\td9\t1\n",
            "qrels/train.tsv:6: corpus-id 'd9' is not in the cor",
        ),
        (
            "qrels/train.tsv",
            QRELS + "q9\td1\t1\n",
            "qrels/train.tsv:6: query-id 'q9' is not in the quer",
        ),
        (
            "qrels/train.tsv",
            QRELS + "q1 d1 1\n",
            "qrels/train.tsv:6: has 1 columns, expected query-id",
        ),
        (
            "qrels/train.tsv",
            QRELS + "q1\td1\tx\n",
            "qrels/train.tsv:6: score 'x' is not a whole number",
        ),
        (
            "qrels/train.tsv",
            QRELS + "q1\td1\t0\n",
            "qrels/train.tsv:6: query-id 'q1' and corpus-id 'd1' have score 0, but 2 in line 3",
        ),
        ("qrels/train.tsv", "", "qrels/train.tsv: no query has a positive"),
        ("qrels/train.tsv", "q1\td1\t0\n", "qrels/train.tsv: no query has a positive"),
        ("qrels/train.tsv", b"q1\td1\t\xff\n", "qrels/train.tsv:1: is not UTF-8"),
        ("corpus.jsonl", "{", "corpus.jsonl:1: is not JSON ("),
        ("corpus.jsonl", "[1]", "corpus.jsonl:1: lacks _id, text"),
        ("corpus.jsonl", '{"_id": "d1"}', "corpus.jsonl:1: lacks text"),
        ("corpus.jsonl", '\n{"_id": "d1", "text": " "}', "corpus.jsonl:2: text is empty"),
        ("corpus.jsonl", '{"_id": "d1", "title": 3, "text": "x"}', "corpus.jsonl:1: text is empty"),
        ("corpus.jsonl", '{"_id": "d1", "text": "\\ud800"}', "corpus.jsonl:1: text is not UTF-8"),
        ("corpus.jsonl", OTHER_TEXT, "corpus.jsonl:2: _id 'd1' has another text than at {path}:1"),
        ("corpus.jsonl", "\n", "corpus.jsonl: holds no rows"),
        ("queries.jsonl", '{"_id": "q1", "text": 3}', "queries.jsonl:1: text is empty"),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "x", "instruction": 3}',
            "queries.jsonl:1: instruction is empty or no text",
        ),
        ("queries.jsonl", b"\xff", "queries.jsonl:1: is not UTF-8"),
        ("queries.jsonl", "", "queries.jsonl: holds no rows"),
    ],
)
def test_errors_name_file_and_line(name, content, message, folder):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{re.escape(message.format(path=path))}.*To fix"):
        list(read_beir(folder))


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"])
@pytest.mark.parametrize("skip", [False, True])
def test_missing_files(name, skip, folder):
    (folder / name).unlink()
    message = rf"{name}: no such file\. To fix, check the path"
    with pytest.raises(FileNotFoundError, match=message):
        list(read_beir(folder, bad=BadRows(skip)))


def skipped(folder: Path, name: str, more: str) -> tuple[list[Row], list[str]]:
    """Rows of a collection with more lines at the end of a file, and what was skipped."""
    with (folder / name).open("ab") as file:
        file.write(more.encode("latin-1"))
    bad = BadRows(skip=True)
    rows = list(read_beir(folder, bad=bad))
    assert bad.count == len(bad.examples)
    return rows, [
        message.removeprefix(f"{folder}/").partition(". To fix")[0] for message in bad.examples
    ]


@pytest.mark.parametrize(
    ("name", "more", "messages"),
    [
        (
            "qrels/train.tsv",
            "q1 d1\n",
            ["qrels/train.tsv:6: has 1 columns, expected query-id, corpus-id"],
        ),
        (
            "qrels/train.tsv",
            "q1\td1\t1.5\n",
            ["qrels/train.tsv:6: score '1.5' is not a whole number"],
        ),
        (
            "qrels/train.tsv",
            "q1\td1\t1\n",
            ["qrels/train.tsv:6: query-id 'q1' and corpus-id 'd1' have"],
        ),
        (
            "qrels/train.tsv",
            "q1\td9\t1\n",
            ["qrels/train.tsv:6: corpus-id 'd9' is not in the corpus"],
        ),
        (
            "qrels/train.tsv",
            "q9\td1\t1\n",
            ["qrels/train.tsv:6: query-id 'q9' is not in the queries"],
        ),
        ("qrels/train.tsv", "\xff\n", ["qrels/train.tsv:6: is not UTF-8"]),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n', ["corpus.jsonl:6: _id 'd1' has another"]),
        ("corpus.jsonl", "{\n\xff\n", ["corpus.jsonl:6: is not JSON (", "corpus.jsonl:7: is not "]),
        ("queries.jsonl", '{"_id": "q1", "text": ""}\n', ["queries.jsonl:3: text is empty or no"]),
    ],
)
def test_wrong_lines_are_skipped(name, more, messages, folder):
    rows, found = skipped(folder, name, more)
    assert rows == ROWS
    assert [a[: len(b)] for a, b in zip(found, messages, strict=True)] == messages


def test_a_query_that_is_left_without_a_positive(folder):
    (folder / "queries.jsonl").write_text(jsonl([*QUERIES, {"_id": "q3", "text": "what?"}]))
    rows, found = skipped(folder, "qrels/train.tsv", "q3\td3\t0\nq3\td9\t1\n")
    assert rows == ROWS
    assert found == [
        "qrels/train.tsv:7: corpus-id 'd9' is not in the corpus",
        "qrels/train.tsv:6: query-id 'q3' has no positive left",
    ]


def test_nothing_is_left(folder):
    (folder / "corpus.jsonl").write_text("{")
    bad = BadRows(skip=True)
    with pytest.raises(
        ValueError, match=r"qrels/train.tsv: no query has a positive\. To fix, choose"
    ):
        list(read_beir(folder, bad=bad))
    assert bad.count == 7  # the line, four judgements, two queries


def test_wrong_passages(folder):
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d6", "text": ""}\n{\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl:6: text is empty or no text\. To fix"):
        list(read_corpus(folder))
    bad = BadRows(skip=True)
    assert list(read_corpus(folder, bad)) == [Row(text) for text in PASSAGES]
    assert bad.count == 2
    (folder / "corpus.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"corpus.jsonl: holds no rows\. To fix"):
        list(read_corpus(folder, bad))


README = """\
---
configs:
- {config_name: corpus, data_files: [{split: corpus, path: corpus.jsonl}]}
- {config_name: queries, data_files: [{split: queries, path: queries.jsonl}]}
- config_name: default
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
---
"""


@pytest.fixture
def scifact(folder, tmp_path, monkeypatch) -> Path:
    """mteb's own SciFact, with its data in a folder laid out as on the hub."""
    lines = [line.split("\t") for line in QRELS.splitlines()[1:]]
    judged = [{"query-id": q, "corpus-id": d, "score": int(s)} for q, d, s in lines]
    for name, rows in (("train", judged), ("test", judged[:1])):
        (folder / f"{name}.jsonl").write_text(jsonl(rows))
    (folder / "README.md").write_text(README)
    monkeypatch.setitem(mteb.get_task("SciFact").metadata.dataset, "path", str(folder))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def test_a_task_by_name(scifact, caplog):
    # In the order of queries.jsonl: that of mteb's judgements changes.
    assert list(read_mteb("SciFact")) == ROWS[::-1]
    assert not caplog.records


def test_the_order_does_not_follow_from_mteb(scifact, monkeypatch):
    load_data = AbsTaskRetrieval.load_data

    def load_in_another_order(task, **arguments):
        load_data(task, **arguments)
        data = task.dataset["default"]["train"]
        data["relevant_docs"] = dict(sorted(data["relevant_docs"].items(), reverse=True))

    monkeypatch.setattr(AbsTaskRetrieval, "load_data", load_in_another_order)
    assert list(read_mteb("SciFact")) == ROWS[::-1]


def test_a_split_that_is_evaluated_is_named(scifact, caplog):
    assert list(read_mteb("SciFact", "test")) == ROWS[:1]
    assert "mteb evaluates SciFact on split 'test', which is trained on here" in caplog.text
    caplog.clear()
    load_split("SciFact", "test", None, training=False)
    assert not caplog.text


def test_all_passages_of_a_task(scifact):
    assert list(read_mteb_corpus("SciFact")) == [Row(text) for text in PASSAGES]


def test_texts_are_those_that_mteb_embeds(scifact, monkeypatch):
    texts: list[str] = []
    model = mteb.get_model("mteb/baseline-random-encoder")
    encode = type(model).encode

    def keep_texts(self, inputs, **arguments):
        texts.extend(text for batch in inputs for text in batch["text"])
        return encode(self, inputs, **arguments)

    monkeypatch.setattr(type(model), "encode", keep_texts)
    task = mteb.get_task("SciFact", eval_splits=["train"])
    mteb.evaluate(model, [task], cache=None, co2_tracker=False, show_progress_bar=False)
    queries = [row.text for row in read_mteb("SciFact")]
    assert sorted(texts) == sorted([*queries, *PASSAGES])


def test_wrong_rows_of_a_task(scifact):
    with (scifact / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d6", "title": "", "text": " "}\n')
    with (scifact / "train.jsonl").open("a") as file:
        file.write(jsonl([{"query-id": "q1", "corpus-id": "d9", "score": 1}]))
    message = r"^mteb SciFact train: corpus-id 'd9' is not in the corpus\. To fix"
    with pytest.raises(ValueError, match=message):
        list(read_mteb("SciFact"))
    message = r"^mteb SciFact train: corpus row 5: text is empty or no text\. To fix"
    with pytest.raises(ValueError, match=message):
        list(read_mteb_corpus("SciFact"))
    bad = BadRows(skip=True)
    assert list(read_mteb("SciFact", bad=bad)) == ROWS[::-1]
    assert len(list(read_mteb_corpus("SciFact", bad=bad))) == len(PASSAGES)
    assert bad.count == 2


def test_the_fingerprint_needs_no_data(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    found = mteb_fingerprint("SciFact")
    assert found == mteb_fingerprint("SciFact", "train", "default")
    assert "mteb/scifact" in found and "d56462d0e63a25450459c4f213e49ffdb866f7f9" in found
    others = [("SciFact", "test", None), ("NFCorpus", "train", None)]
    others += [("MIRACLRetrieval", "train", language) for language in ("de", "sw")]
    assert len({found, *(mteb_fingerprint(*other) for other in others)}) == 5


def test_the_fingerprint_is_of_what_mteb_would_read(monkeypatch):
    before = mteb_fingerprint("SciFact")
    monkeypatch.setitem(mteb.get_task("SciFact").metadata.dataset, "revision", "2")
    assert mteb_fingerprint("SciFact") != before
