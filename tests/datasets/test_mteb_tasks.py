"""Rows of tasks that mteb knows by name, read by mteb's own code from a local repository."""

import json

import mteb
import pytest

from bge_pruning.datasets.mteb_tasks import fingerprint_mteb, read_mteb, read_mteb_corpus
from bge_pruning.datasets.rows import BadRows, Row

CARD = """---
configs:
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
- config_name: default
  data_files: [{split: train, path: qrels/train.jsonl}, {split: test, path: qrels/test.jsonl}]
---
"""
FILES = {
    "corpus.jsonl": [
        {"_id": "d1", "title": "Cats", "text": "They sleep."},
        {"_id": "d2", "title": "", "text": "Hunde bellen."},
        {"_id": "d3", "title": "Birds", "text": "They sing."},
    ],
    "queries.jsonl": [
        {"_id": "q2", "text": "who sleeps?"},
        {"_id": "q1", "text": "wer bellt?"},
    ],
    "qrels/train.jsonl": [
        {"query-id": "q1", "corpus-id": "d2", "score": 1},
        {"query-id": "q2", "corpus-id": "d3", "score": 0},
        {"query-id": "q2", "corpus-id": "d1", "score": 1},
    ],
    "qrels/test.jsonl": [{"query-id": "q1", "corpus-id": "d2", "score": 1}],
}


@pytest.fixture
def scifact(tmp_path, monkeypatch):
    """The task SciFact of mteb, whose repository is a folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "scifact"
    (folder / "qrels").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    metadata = type(mteb.get_task("SciFact")).metadata
    monkeypatch.setitem(metadata.dataset, "path", str(folder))
    return folder


def test_rows_are_the_judged_queries_in_order(scifact):
    assert list(read_mteb("SciFact")) == [
        Row("who sleeps?", ("Cats They sleep.", "Birds They sing."), 1),
        Row("wer bellt?", ("Hunde bellen.",), 1),
    ]
    assert [row.text for row in read_mteb("SciFact", "test")] == ["wer bellt?"]


def test_every_passage_is_read(scifact):
    texts = [row.text for row in read_mteb_corpus("SciFact")]
    assert texts == ["Cats They sleep.", "Hunde bellen.", "Birds They sing."]


def test_wrong_rows(scifact):
    with (scifact / "qrels" / "train.jsonl").open("a") as file:
        file.write('{"query-id": "q1", "corpus-id": "d9", "score": 1}\n')
    message = r"SciFact\[train\] query q1: corpus-id 'd9' is not in the corpus. To fix"
    with pytest.raises(ValueError, match=message):
        list(read_mteb("SciFact"))
    bad = BadRows(skip=True)
    assert len(list(read_mteb("SciFact", bad=bad))) == bad.count == 1


def test_a_split_that_a_task_lacks(scifact):
    message = r"SciFact: cannot load split 'dev' .*Split dev not found in .*train.*use kind beir"
    with pytest.raises(FileNotFoundError, match=message):
        list(read_mteb("SciFact", "dev"))


def test_a_task_that_cannot_be_fetched(scifact):
    for path in scifact.iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(FileNotFoundError, match=r"SciFact: cannot load split 'train'.*To fix"):
        list(read_mteb("SciFact"))


@pytest.mark.parametrize(
    ("name", "subset", "message"),
    [
        ("SciFakt", None, r"mteb has no task 'SciFakt'. To fix, did you mean SciFact"),
        ("xqzxqz", None, r"mteb has no task 'xqzxqz'. To fix, see mteb.get_tasks"),
        ("STSBenchmark", None, r"STSBenchmark is of type STS, not a retrieval task. To fix"),
        ("MIRACLRetrieval", None, r"has the subsets ar, bn, .*, not None. To fix, set subset"),
        ("MIRACLRetrieval", "xx", r"has the subsets ar, bn, .*, not xx. To fix, set subset"),
    ],
)
def test_tasks_that_are_refused_at_once(name, subset, message):
    with pytest.raises(ValueError, match=message):
        fingerprint_mteb(name, "train", subset)


def test_fingerprints_name_repository_revision_split_and_subset():
    found = fingerprint_mteb("MIRACLRetrieval", "train", "de")
    dataset = mteb.get_task("MIRACLRetrieval").metadata.dataset
    assert found == f"{dataset['path']} {dataset['revision']} train de"
