"""Files, folders and names as tasks of mteb."""

from unittest.mock import Mock

import mteb
import pytest

from bge_pruning.datasets.retrieval_collection import read_collection
from bge_pruning.evaluation import tasks
from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.tasks import (
    RETRIEVAL,
    SIMILARITY,
    beir_task,
    find_tasks,
    mteb_task,
    named_tasks,
    sts_task,
)


def test_a_file_of_pairs(sts_csv):
    task = sts_task(sts_csv)
    first, second, gold = task.pairs()
    assert (task.name, task.kind, task.split) == ("tiny", SIMILARITY, "test")
    assert len(first) == len(second) == len(gold) == 40
    line = sts_csv.read_text().splitlines()[3].split(",")
    assert [first[3], second[3], gold[3]] == [line[0], line[1], float(line[2])]


def test_files_and_folders_together(sts_csv, collection, tmp_path):
    (tmp_path / "other.csv").write_text(sts_csv.read_text())
    first, second = find_tasks([str(tmp_path / "other.csv")], [str(collection)])
    assert (first.name, first.kind) == ("other", SIMILARITY)
    assert (second.name, second.kind, len(second.queries())) == ("tiny", RETRIEVAL, 15)
    with pytest.raises(ValueError, match="two tasks are called tiny. To fix, rename a file or"):
        find_tasks([str(sts_csv)], [str(collection)])


def test_files_that_are_flat_or_not_there(tmp_path):
    file = tmp_path / "flat.csv"
    file.write_text("a man,a dog,2\na cat,a dog,2\n")
    with pytest.raises(ValueError, match=r"flat\.csv: every gold score is 2, so no corr.*To fix"):
        sts_task(file)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        find_tasks([str(tmp_path / "none.csv")], [])
    with pytest.raises(FileNotFoundError, match="none"):
        find_tasks([], [str(tmp_path / "none")])


# Tasks that mteb knows by name: the real library, over data sets in local folders


PAIRS = [
    {"sentence1": "a man", "sentence2": "the man", "score": 4.5},
    {"sentence1": "a dog", "sentence2": "the man", "score": 0.5},
    {"sentence1": "a dog", "sentence2": "a cat", "score": 2.0},
]


def test_a_similarity_task_by_name(serve):
    serve("STSBenchmark", {"default": {"test": PAIRS, "train": PAIRS[:1]}})
    (task,) = find_tasks(["STSBenchmark"], [])
    assert (task.name, task.split, task.subset) == ("STSBenchmark", "test", "default")
    assert list(zip(*task.pairs(), strict=True)) == [tuple(row.values()) for row in PAIRS]


def test_subsets_are_tasks_of_their_own(serve):
    subsets = mteb.get_task("STS17").metadata.hf_subsets
    rows = [{**row, "lang": name} for name in subsets for row in PAIRS]
    serve("STS17", {"default": {"test": rows}})
    (one,) = named_tasks("STS17:en-de", SIMILARITY)
    assert (one.name, one.subset) == ("STS17:en-de", "en-de")
    assert len(one.pairs()[0]) == 3
    names = [task.name for task in named_tasks("STS17", SIMILARITY)]
    assert names == [f"STS17:{subset}" for subset in subsets]
    with pytest.raises(ValueError, match=r"has no subset 'xx', but .*en-de.*\. To fix, choose one"):
        named_tasks("STS17:xx", SIMILARITY)


def test_a_retrieval_task_by_name_is_scored(serve, model_folder):
    texts = ("the man reads", "a red book", "dogs eat")
    corpus = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)]
    queries = [{"_id": "q1", "text": "a book"}, {"_id": "q2", "text": "dog"}]
    judged = [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n in (1, 2)]
    configs = {"corpus": {"corpus": corpus}, "queries": {"queries": queries}}
    serve("SciFact", {**configs, "default": {"test": judged}})
    (task,) = find_tasks([], ["SciFact"])
    assert (task.name, task.kind) == ("SciFact", RETRIEVAL)
    assert sorted(task.queries()) == ["a book", "dog"]
    score = score_tasks(load_encoder(str(model_folder)), [task], ["dense"])["SciFact", "dense"]
    assert len(score.samples) == 2
    assert score.values["ndcg_at_10"] == pytest.approx(score.samples.mean(), abs=1e-4)


def test_tasks_that_mteb_does_not_have(offline):
    with pytest.raises(FileNotFoundError, match=r"mteb task 'STSBenchmark': cannot load.*To fix"):
        find_tasks(["STSBenchmark"], [])
    with pytest.raises(ValueError, match=r"has no task 'STSBenchmrk', but .*STSBenchmark.*To fix"):
        find_tasks(["STSBenchmrk"], [])
    message = "task 'SciFact' is of type Retrieval over text, expected pairs of sentences with sc"
    with pytest.raises(ValueError, match=message):
        find_tasks(["SciFact"], [])
    with pytest.raises(ValueError, match="'STS17' is of type STS over text, expected queries with"):
        find_tasks([], ["STS17"])


def test_one_split_of_a_retrieval_task_scores_as_the_same_files(
    collection, model_folder, monkeypatch
):
    read = Mock(return_value=read_collection(collection))
    monkeypatch.setattr(tasks, "read_mteb_collection", read)
    named, files = mteb_task("Named", "dev", "de"), beir_task(collection)
    read.assert_called_once_with("Named", "dev", "de")
    assert named.split == "dev"
    found = score_tasks(load_encoder(str(model_folder)), [named, files], ["dense", "all"])
    for mode in ("dense", "all"):
        assert found["Named", mode].values == found["tiny", mode].values
        assert found["Named", mode].samples.tolist() == found["tiny", mode].samples.tolist()
