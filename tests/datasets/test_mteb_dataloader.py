"""Rows of collections in BEIR layout, and of mteb tasks by name."""

import gzip
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
from tests.common.hub import jsonl

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
PASSAGES = ["Cats They sleep.", "Hunde bellen.", "Birds They sing.", "鱼会游泳。"]
PASSAGES.append("Nobody judged this.")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "corpus.jsonl").write_text(jsonl(CORPUS))
    (tmp_path / "queries.jsonl").write_text(jsonl(QUERIES))
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text(QRELS, encoding="utf-8")
    return tmp_path


def append(path: Path, more: str) -> Path:
    with path.open("ab") as file:
        file.write(more.encode("latin-1"))
    return path


def test_rows_are_the_judged_queries_and_passages_all(folder):
    assert list(read_beir(folder)) == ROWS
    assert list(read_corpus(folder)) == [Row(text) for text in PASSAGES]
    # A judgement and a passage may be listed twice.
    append(folder / "qrels" / "train.tsv", "q1\td1\t2\n")
    append(folder / "corpus.jsonl", jsonl(CORPUS[:1]))
    assert list(read_beir(folder)) == ROWS


def test_another_split_without_a_header_and_with_a_query_that_has_no_positive(folder, caplog):
    path = folder / "qrels" / "dev.tsv"
    path.write_text("q1\td1\t1\r\n\r\nq2\td2\t0\r\n")
    bad = BadRows()
    with caplog.at_level(logging.INFO):
        assert [row.text for row in read_beir(folder, "dev", bad)] == ["who sleeps?"]
    assert f"{path}: 1 of 2 queries have no positive" in caplog.text
    assert bad.count == 0


def test_an_instruction_is_written_after_the_query(folder):
    rows = [{**row, "instruction": "answer"} for row in QUERIES]
    (folder / "queries.jsonl").write_text(jsonl(rows))
    assert [row.text for row in read_beir(folder)] == ["wer bellt? answer", "who sleeps? answer"]


TSV, TEXTS, ASKED = "qrels/train.tsv", "corpus.jsonl", "queries.jsonl"


@pytest.mark.parametrize(
    ("name", "more", "messages"),
    [
        (TSV, "q1 d1\n", [":6: has 1 columns, expected query-id, corpus-id"]),
        (TSV, "q1\td1\tx\n", [":6: score 'x' is not a whole number"]),
        (TSV, "q1\td1\t1.5\n", [":6: score '1.5' is not a whole number"]),
        (TSV, "q1\td1\t0\n", [":6: query-id 'q1' and corpus-id 'd1' have score 0, but 2 in line"]),
        (TSV, "\xff\n", [":6: is not UTF-8"]),
        (TEXTS, "{\n\xff\n", [":6: is not JSON (", ":7: is not UTF-8"]),
        (TEXTS, "[1]\n", [":6: lacks _id, text"]),
        (TEXTS, '{"_id": "d1"}\n', [":6: lacks text"]),
        (TEXTS, '\n{"_id": "d1", "text": " "}\n', [":7: text is empty"]),
        (TEXTS, '{"_id": "d1", "title": 3, "text": "x"}\n', [":6: text is empty"]),
        (TEXTS, '{"_id": "d1", "text": "\\ud800"}\n', [":6: text is not UTF-8"]),
        (TEXTS, '{"_id": "d1", "text": "x"}\n', [":6: _id 'd1' has another text than at {path}:1"]),
        (ASKED, '{"_id": "q1", "text": 3}\n', [":3: text is empty or no text"]),
        (ASKED, '{"_id": "q1", "text": "x", "instruction": 3}', [":3: instruction is empty or no"]),
        (ASKED, "\xff\n", [":3: is not UTF-8"]),
    ],
)
def test_wrong_lines_are_named_or_skipped(name, more, messages, folder):
    path = append(folder / name, more)
    messages = [str(path) + message.format(path=path) for message in messages]
    with pytest.raises(ValueError, match=f"{re.escape(messages[0])}.*To fix"):
        list(read_beir(folder))
    bad = BadRows(skip=True)
    assert list(read_beir(folder, bad=bad)) == ROWS
    assert bad.count == len(bad.examples) == len(messages)
    assert all(found.startswith(m) for found, m in zip(bad.examples, messages, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TSV, "", "qrels/train.tsv: no query has a positive"),
        (TSV, "q1\td1\t0\n", "qrels/train.tsv: no query has a positive"),
        (TEXTS, "\n", "corpus.jsonl: holds no rows"),
        (ASKED, "", "queries.jsonl: holds no rows"),
    ],
)
def test_files_that_hold_nothing(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*To fix"):
        list(read_beir(folder))


@pytest.mark.parametrize("name", [TSV, TEXTS, ASKED])
@pytest.mark.parametrize("skip", [False, True])
def test_missing_files(name, skip, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file\. To fix, check the path"):
        list(read_beir(folder, bad=BadRows(skip)))


def test_judgements_of_what_is_not_there_are_noted(folder):
    """As ArguAna and NFCorpus are published; a query may be left without a positive."""
    (folder / "queries.jsonl").write_text(jsonl([*QUERIES, {"_id": "q3", "text": "what?"}]))
    path, bad = append(folder / TSV, "q1\td9\t1\nq3\td8\t1\nq9\td1\t1\n"), BadRows()
    assert list(read_beir(folder, bad=bad)) == ROWS
    assert bad.count == 0
    assert bad.notes == [
        f"{path}: 1 of 7 judgements have a query-id that is not in the queries, such as 'q9' in "
        f"line 8",
        f"{path}: 2 of 7 judgements have a corpus-id that is not in the corpus, such as 'd9' in "
        f"line 6",
    ]


def test_a_query_that_is_a_passage_and_one_passage_under_two_ids(folder):
    """Its own passage is neither positive nor negative; a positive is no negative too."""
    own = [{"_id": "q1", "title": "Asked", "text": "who sleeps?"}, {**CORPUS[0], "_id": "d9"}]
    append(folder / TEXTS, jsonl(own))
    append(folder / TSV, "q1\td9\t0\n")
    bad = BadRows()
    assert list(read_beir(folder, bad=bad)) == [*ROWS, Row("who sleeps?", ("Asked who sleeps?",))]
    assert bad.notes == [
        f"{folder / TSV}: 1 of 2 queries are passages too, of the same id, which are neither found "
        f"nor a negative of theirs, as in mteb"
    ]


def test_packed_files(folder):
    for name in (TSV, TEXTS, ASKED):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    assert list(read_beir(folder)) == ROWS
    assert list(read_corpus(folder)) == [Row(text) for text in PASSAGES]


def test_nothing_is_left(folder):
    (folder / "corpus.jsonl").write_text("{")
    bad = BadRows(skip=True)
    message = r"train.tsv: no query has a positive that is there\. To fix, choose .*one collection"
    with pytest.raises(ValueError, match=message):
        list(read_beir(folder, bad=bad))
    assert (bad.count, len(bad.notes)) == (1, 1)


def test_wrong_passages(folder):
    append(folder / "corpus.jsonl", '{"_id": "d6", "text": ""}\n{\n')
    with pytest.raises(ValueError, match=r"corpus.jsonl:6: text is empty or no text\. To fix"):
        list(read_corpus(folder))
    bad = BadRows(skip=True)
    assert list(read_corpus(folder, bad)) == [Row(text) for text in PASSAGES]
    assert bad.count == 2
    (folder / "corpus.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"corpus.jsonl: holds no rows\. To fix"):
        list(read_corpus(folder, bad))


@pytest.fixture
def scifact(serve) -> Path:
    """mteb's own SciFact, with its data in a folder laid out as on the hub."""
    lines = [line.split("\t") for line in QRELS.splitlines()[1:]]
    judged = [{"query-id": q, "corpus-id": d, "score": int(s)} for q, d, s in lines]
    configs = {"corpus": {"corpus": CORPUS}, "queries": {"queries": QUERIES}}
    return serve("SciFact", {**configs, "default": {"train": judged, "test": judged[:1]}})


def test_a_task_by_name_and_a_split_that_is_evaluated(scifact, caplog):
    # In the order of the queries: that of mteb's judgements changes.
    assert list(read_mteb("SciFact")) == ROWS[::-1]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert list(read_mteb_corpus("SciFact")) == [Row(text) for text in PASSAGES]
    assert list(read_mteb("SciFact", "test")) == ROWS[:1]
    assert "mteb evaluates SciFact on split 'test', which is trained on here" in caplog.text
    caplog.clear()
    load_split("SciFact", "test", None, training=False)
    assert "trained on" not in caplog.text


def test_the_order_does_not_follow_from_mteb(scifact, monkeypatch):
    load_data = AbsTaskRetrieval.load_data

    def load_in_another_order(task, **arguments):
        load_data(task, **arguments)
        data = task.dataset["default"]["train"]
        data["relevant_docs"] = dict(sorted(data["relevant_docs"].items(), reverse=True))

    monkeypatch.setattr(AbsTaskRetrieval, "load_data", load_in_another_order)
    assert list(read_mteb("SciFact")) == ROWS[::-1]


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
    append(scifact / "corpus-corpus.jsonl", '{"_id": "d6", "title": "", "text": " "}\n')
    more = jsonl([{"query-id": "q1", "corpus-id": "d9", "score": 1}])
    append(scifact / "default-train.jsonl", more)
    message = r"^mteb SciFact train: corpus row 5: text is empty or no text\. To fix"
    with pytest.raises(ValueError, match=message):
        list(read_mteb_corpus("SciFact"))
    bad = BadRows(skip=True)
    assert list(read_mteb("SciFact", bad=bad)) == ROWS[::-1]
    assert len(list(read_mteb_corpus("SciFact", bad=bad))) == len(PASSAGES)
    assert bad.count == 1
    assert bad.notes == [
        "mteb SciFact train: 1 of 5 judgements have a corpus-id that is not in the corpus, such as "
        "'d9'"
    ]


def test_the_fingerprint_needs_no_data_and_is_of_what_mteb_would_read(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    found = mteb_fingerprint("SciFact")
    assert found == mteb_fingerprint("SciFact", "train", "default")
    assert "mteb/scifact" in found and "d56462d0e63a25450459c4f213e49ffdb866f7f9" in found
    others = [("SciFact", "test", None), ("NFCorpus", "train", None)]
    others += [("MIRACLRetrieval", "train", language) for language in ("de", "sw")]
    assert len({found, *(mteb_fingerprint(*other) for other in others)}) == 5
    monkeypatch.setitem(mteb.get_task("SciFact").metadata.dataset, "revision", "2")
    assert mteb_fingerprint("SciFact") != found
