"""A whole collection, and what is said about one that is wrong."""

import gzip
import json
import re

import pytest
from datasets import Dataset

from bge_pruning.datasets.retrieval_collection import (
    check_mteb_data,
    choose_split,
    read_collection,
)

CORPUS = '{"_id": "d1", "title": "Cats", "text": "sleep"}\n{"_id": 2, "text": "dogs"}\n'
QUERIES = '{"_id": "q1", "text": "who?"}\n{"_id": "q2", "text": "not judged"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\t2\t0\n"
CATS = {"id": "d1", "title": "Cats", "text": "sleep"}
OTHER = '{"_id": "d1", "title": "Cats", "text": "bark"}\n'
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
        ("qrels/test.tsv", "", "test.tsv: judges no passage relevant that is there. To fix, choo"),
        ("qrels/test.tsv", "q1\td1\t0\n", "test.tsv: judges no passage relevant that is there."),
        ("qrels/test.tsv", "q9\td1\t1\nq1\td9\t1\n", "test.tsv: judges no passage relevant that"),
        ("qrels/test.tsv", LARGE, ":4: score 1e+30 is not in [-1000000, 1000000]. To fix, see"),
        ("corpus.jsonl", CORPUS + OTHER, "corpus.jsonl:3: _id 'd1' has another text than at {}:1."),
        (
            "queries.jsonl",
            QUERIES + OTHER.replace("d1", "q1"),
            "jsonl:3: _id 'q1' has another text",
        ),
        (
            "corpus.jsonl",
            json.dumps({"_id": "d1", "text": 3}),
            "corpus.jsonl:1: text is empty or no",
        ),
        ("queries.jsonl", json.dumps({"_id": "q1", "text": " "}), "queries.jsonl:1: text is empty"),
        ("corpus.jsonl", "{", "corpus.jsonl:1: is not JSON"),
    ],
)
def test_errors_name_file_and_line(name, content, message, folder):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message.format(folder / name))):
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


OF_NOTHING = "q1\td9\t2\nq1\td8\t0\nq9\td1\t1\n"


def test_published_sets_judge_what_is_not_there_and_repeat_lines(folder, caplog):
    qrels = folder / "qrels" / "test.tsv"
    qrels.write_text(QRELS + OF_NOTHING)
    empty = json.dumps({"_id": "d3", "text": " "}) + "\n"
    (folder / "corpus.jsonl").write_text(CORPUS + CORPUS + empty)
    found = read_collection(folder)
    assert found.relevant == {"q1": {"d1": 1, "2": 0, "d9": 2, "d8": 0}}
    assert [len(found.corpus), [row["id"] for row in found.queries]] == [3, ["q1"]]
    assert [record.message.removeprefix("evaluation: ") for record in caplog.records] == [
        f"{folder / 'corpus.jsonl'}: 2 lines repeat another one, and count once",
        f"{folder / 'corpus.jsonl'}: 1 passages are empty, and are searched as such",
        f"{qrels}: 1 of 5 judgements have a query-id that is not in the queries, such as 'q9' in "
        f"line 6",
        f"{qrels}: 2 of 5 judgements have a corpus-id that is not in the corpus, such as 'd9' in "
        f"line 4",
    ]


def test_packed_files_and_instructions(folder):
    expected = read_collection(folder)
    for path in (*folder.glob("*.jsonl"), *folder.glob("qrels/*")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_collection(folder) == expected
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "who?", "instruction": "find"}\n')
    assert read_collection(folder).queries == [
        {"id": "q1", "title": "", "text": "who?", "instruction": "find"}
    ]


@pytest.mark.parametrize(
    ("passage", "judged", "own"),
    [
        ('{"_id": "q1", "title": "A title", "text": "who?"}', "q1\td1\t1\n", True),
        ('{"_id": "q1", "text": "who?"}', "q1\td1\t1\nq1\tq1\t0\n", True),
        # Ids that are the same by chance.
        ('{"_id": "q1", "text": "something else"}', "q1\td1\t1\n", False),
        ('{"_id": "q1", "text": "who? it is"}', "q1\td1\t1\nq1\tq1\t1\n", False),
    ],
)
def test_whether_a_passage_is_the_query_itself(passage, judged, own, folder, caplog):
    (folder / "corpus.jsonl").write_text(CORPUS + passage)
    (folder / "qrels" / "test.tsv").write_text(judged)
    assert read_collection(folder).own is own
    assert ("test.tsv: 1 of 1 queries are passages too, of the same id" in caplog.text) is own


DATA = {
    "corpus": Dataset.from_list([CATS, {"id": "2", "text": "dogs"}]),
    "queries": Dataset.from_list([{"id": "q1", "text": "who?", "instruction": "find it"}]),
    "relevant_docs": {"q1": {"d1": 1, "2": 0, "d9": 1}, "q9": {"d1": 1}},
    "top_ranked": None,
}


def test_a_task_of_mteb(caplog):
    check_mteb_data("mteb Task dev", DATA, own=False)
    assert [record.message for record in caplog.records] == [
        f"evaluation: mteb Task dev: 1 of 4 judgements have a {name}-id that is not in the "
        f"{table}, such as '{example}'"
        for name, table, example in (("query", "queries", "q9"), ("corpus", "corpus", "d9"))
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_ranked": {"q1": ["d1"]}}, "lists the passages that each query may rank, and whole"),
        ({"relevant_docs": {"q1": {"d1": 0, "d9": 1}}}, "judges no passage relevant that is there"),
        ({"queries": Dataset.from_list([{"id": "q1", "text": " "}])}, "query q1: text is empty"),
    ],
)
def test_what_is_wrong_with_a_task_of_mteb(changes, message):
    with pytest.raises(ValueError, match=f"mteb Task dev: {message}.*To fix"):
        check_mteb_data("mteb Task dev", {**DATA, **changes}, own=False)
