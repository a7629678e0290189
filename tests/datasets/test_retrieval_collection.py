"""A whole collection, and what is said about one that is wrong."""

import json
import re
from unittest.mock import Mock

import pytest

from bge_pruning.datasets import retrieval_collection
from bge_pruning.datasets.retrieval_collection import (
    choose_split,
    read_collection,
    read_mteb_collection,
)

CORPUS = '{"_id": "d1", "title": "Cats", "text": "sleep"}\n{"_id": 2, "text": "dogs"}\n'
QUERIES = '{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "not judged"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\t2\t0\n"
CATS = {"id": "d1", "title": "Cats", "text": "sleep"}
LARGE = QRELS + f"q2\td1\t{10**30}\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(CORPUS)
    (tmp_path / "queries.jsonl").write_text(QUERIES)
    (tmp_path / "qrels" / "test.tsv").write_text(QRELS)
    return tmp_path


def test_all_passages_and_the_judged_queries(folder):
    found = read_collection(folder)
    assert found.corpus == [CATS, {"id": "2", "title": "", "text": "dogs"}]
    assert [row["id"] for row in found.queries] == ["q1"]
    assert found.relevant == {"q1": {"d1": 1, "2": 0}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels/test.tsv", "", "test.tsv: judges no passage relevant. To fix, choose another"),
        ("qrels/test.tsv", "q1\td1\t0\n", "test.tsv: judges no passage relevant."),
        ("qrels/test.tsv", QRELS + "q9\td1\t1\n", "test.tsv:4: query-id 'q9' is not in the query"),
        ("qrels/test.tsv", LARGE, ":4: score 1e+30 is not in [-1000000, 1000000]. To fix, see"),
        ("qrels/test.tsv", QRELS + "q2\td9\t1\n", "test.tsv:4: corpus-id 'd9' is not in the"),
        ("corpus.jsonl", CORPUS + CORPUS, "corpus.jsonl:3: _id 'd1' is there twice. To fix"),
        ("queries.jsonl", QUERIES + QUERIES, "queries.jsonl:3: _id 'q1' is there twice."),
        ("corpus.jsonl", json.dumps({"_id": "d1", "text": " "}), "corpus.jsonl:1: text is empty"),
        ("corpus.jsonl", "{", "corpus.jsonl:1: is not JSON"),
    ],
)
def test_errors_name_file_and_line(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_collection(folder)


def test_the_split_test_or_the_only_one_is_evaluated(folder, messages):
    assert choose_split(folder) == "test" and not messages.messages
    qrels = folder / "qrels"
    (qrels / "test.tsv").rename(qrels / "train.tsv")
    with messages.at_level("INFO"):
        assert choose_split(folder) == "train"
    assert messages.messages == [f"{folder} is evaluated on its only split, train"]
    (qrels / "dev.tsv").write_text(QRELS)
    with pytest.raises(ValueError, match="has no split test, but dev, train. To fix, .* --split"):
        choose_split(folder)
    (qrels / "test.tsv").write_text(QRELS)
    assert choose_split(folder) == "test"


def test_missing_split(folder):
    with pytest.raises(FileNotFoundError, match=r"dev.tsv: no such file. To fix, check the path"):
        read_collection(folder, "dev")


ASKED = {"id": "q1", "text": "who?", "instruction": "find it"}


def split_of(**changes) -> dict:
    return {
        "corpus": [CATS, {"id": 2, "text": "dogs"}],
        "queries": [ASKED, {"id": "q2", "text": "not judged"}],
        "relevant_docs": {"q1": {"d1": 1, 2: 0}, "q9": {"d1": 1}},
        "top_ranked": None,
        **changes,
    }


def mteb_has(data: dict, monkeypatch) -> Mock:
    load = Mock(return_value=("mteb Task dev", data))
    monkeypatch.setattr(retrieval_collection, "load_split", load)
    return load


def test_a_task_of_mteb(monkeypatch):
    load = mteb_has(split_of(), monkeypatch)
    found = read_mteb_collection("Task", "dev", "de")
    load.assert_called_once_with("Task", "dev", "de", training=False)
    assert found.corpus == [CATS, {"id": "2", "text": "dogs"}]
    assert found.queries == [ASKED]
    assert found.relevant == {"q1": {"d1": 1, "2": 0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_ranked": {"q1": ["d1"]}}, "lists the passages that each query may rank, and whole"),
        ({"relevant_docs": {"q1": {"d1": 0}}}, "judges no passage relevant"),
        ({"corpus": [{"id": "d1", "text": ""}]}, "passage d1: text is empty"),
        ({"queries": [{"id": "q1", "text": " "}]}, "query q1: text is empty"),
    ],
)
def test_what_is_wrong_with_a_task_of_mteb(changes, message, monkeypatch):
    mteb_has(split_of(**changes), monkeypatch)
    with pytest.raises(ValueError, match=f"mteb Task dev: {message}.*To fix"):
        read_mteb_collection("Task", "dev")
