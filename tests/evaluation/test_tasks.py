"""Files, folders and names as tasks of mteb."""

import gzip
from dataclasses import replace
from pathlib import Path

import mteb
import pytest
from mteb.models import ModelMeta

from bge_pruning.config.names import MODES, OUTPUTS
from bge_pruning.evaluation.encoders import load_encoder
from bge_pruning.evaluation.evaluate import evaluate
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.similarity import PairCache
from bge_pruning.evaluation.tasks import (
    RETRIEVAL,
    SIMILARITY,
    beir_task,
    find_tasks,
    mteb_task,
    named_tasks,
    sts_task,
)
from tests.common.data import write_parallel
from tests.common.hub import jsonl


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


# Collections as they are published


TEXTS = ["the man reads", "a red book", "dogs eat", "the woman sings a song", "a red book"]
TEXTS += ["a child plays", "the dog runs fast", "a man rides a horse", "the cat is in the house"]
# q0 and q1 are passages too, under the same id, and titles make their texts others.
PUBLISHED = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(TEXTS)]
PUBLISHED += [{"_id": f"q{n}", "title": "the", "text": TEXTS[n]} for n in (0, 1)]
PUBLISHED += [*PUBLISHED[5:6], {"_id": "d10", "title": "", "text": ""}]  # the same line twice
ASKED = [{"_id": f"q{n}", "text": text} for n, text in enumerate([*TEXTS[:2], "a song", "dog"])]
JUDGED = [("q0", "d7", 1), ("q1", "d4", 2), ("q1", "d99", 1), ("q2", "d3", 1), ("q3", "d6", 1)]
JUDGED += [("q3", "d98", 1), ("q9", "d1", 1)]  # not all of them are there


class Encodes:
    """The model as mteb would be given it, to embed texts."""

    def __init__(self, encoder, mode):
        self.encoder, self.mode = encoder, mode
        self.mteb_model_meta = ModelMeta.create_empty({"name": "a/b", "revision": "0"})

    def encode(self, inputs, **kwargs):
        return self.encoder.encode([text for batch in inputs for text in batch["text"]]).dense_vecs

    def similarity(self, a, b):
        return a @ b.T

    similarity_pairwise = similarity


class Searches(Encodes):
    """The same, to search: it compares one query with one passage at a time."""

    def index(self, corpus, **kwargs):
        self.passages = [(row["id"], f"{row['title']} {row['text']}".strip()) for row in corpus]

    def search(self, queries, **kwargs):
        return {
            query["id"]: {name: self.score(query["text"], text) for name, text in self.passages}
            for query in queries
        }

    def score(self, *texts):
        return float(PairCache(self.encoder, texts[:1], texts[1:], OUTPUTS).scores(self.mode)[0])


def publish(serve, folder, task_name):
    """The collection as a task of mteb, and as a folder of packed files."""
    judged = [{"query-id": q, "corpus-id": p, "score": s} for q, p, s in JUDGED]
    configs = {"corpus": {"corpus": PUBLISHED}, "queries": {"queries": ASKED}}
    serve(task_name, {**configs, "default": {"test": judged}})
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", PUBLISHED), ("queries", ASKED)):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl(rows).encode()))
    lines = "".join(
        "\t".join(map(str, row)) + "\n" for row in [("query-id", "corpus-id", "score"), *JUDGED]
    )
    (folder / "qrels" / "test.tsv").write_text(lines)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_published_collections_score_as_in_mteb(serve, tmp_path, model_folder, caplog, mode):
    """Whichever way they are named, and in every mode."""
    folder = publish(serve, tmp_path / "arguana", "ArguAna")
    encoder = load_encoder(str(model_folder))
    (named,) = find_tasks([], ["ArguAna"])
    roads = [named, replace(mteb_task("ArguAna", "test"), name="split"), beir_task(folder)]
    assert "1 of 7 judgements have a query-id that is not in the queries" in caplog.text
    assert "2 of 7 judgements have a corpus-id that is not in the corpus" in caplog.text
    assert "2 of 4 queries are passages too" in caplog.text
    found = score_tasks(encoder, roads, [mode])
    for kind in (Searches, Encodes)[: 1 + (mode == "dense")]:
        task = mteb.get_task("ArguAna")
        result = mteb.evaluate(kind(encoder, mode), [task], cache=None, co2_tracker=False)
        (expected,) = result.task_results[0].scores["test"]
        for road in roads:
            values = found[road.name, mode].values
            assert values == pytest.approx({n: expected[n] for n in values}, abs=1e-4)


def test_a_query_that_is_a_passage_by_chance_only_is_found(tmp_path, model_folder):
    """Numbers are ids of both, and the passage of a query has its number."""
    folder = tmp_path / "numbered"
    (folder / "qrels").mkdir(parents=True)
    texts = [{"_id": str(n), "text": text} for n, text in enumerate(TEXTS[:4])]
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").write_text(jsonl(texts))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{n}\t{n}\t1\n" for n in range(4)))
    score = score_tasks(load_encoder(str(model_folder)), [beir_task(folder)], ["dense"])
    assert score["numbered", "dense"].values["ndcg_at_10"] == 1.0


def test_parallel_lines_score_as_the_same_collection_in_a_folder(
    tmp_path, model_folder, parallel_path
):
    """Exactly, in every mode, with prompts, with lines that have one text, and with its floors."""
    source, folder = Path(parallel_path).parent, tmp_path / "folder"
    lines = {
        name: gzip.decompress((source / f"news-{name}.txt.gz").read_bytes()).decode().split("\n")
        for name in ("de", "en")
    }
    chosen = {name: [*texts[-31:-1], texts[-2]] for name, texts in lines.items()}
    path = write_parallel(tmp_path, **{n: f"no/{'/'.join(texts)}" for n, texts in chosen.items()})
    (folder / "qrels").mkdir(parents=True)
    for file, name in (("queries", "de"), ("corpus", "en")):
        rows = [{"_id": str(n), "text": text} for n, text in enumerate(chosen[name], start=2)]
        (folder / f"{file}.jsonl").write_text(jsonl(rows))
    twice = [(31, 31), (31, 32), (32, 31), (32, 32)]  # the last line is there again
    judged = [*((n, n) for n in range(2, 31)), *twice]
    (folder / "qrels" / "test.tsv").write_text("".join(f"{q}\t{p}\t1\n" for q, p in judged))
    tasks = find_tasks([], [str(folder)], None, {path: ["de-en", "en-de"]}, "1:")
    assert [task.name for task in tasks] == ["folder", "news-de-en", "news-en-de"]
    assert (tasks[1].kind, tasks[1].split, len(tasks[1].queries())) == (RETRIEVAL, "1:", 31)
    prompts = {"query": "the ", "passage": "a "}
    found = evaluate(str(model_folder), None, tasks, list(MODES), device="cpu", prompts=prompts)
    entries = {
        name: [e for e in found.tasks if e.task == name] for name in ("folder", "news-de-en")
    }
    fields = ("mode", "metric", "value", "floors", "interval", "samples", "texts", "truncated")
    ours, theirs = (
        [{key: getattr(e, key) for key in fields} for e in part] for part in entries.values()
    )
    assert ours == theirs
    assert {row["mode"] for row in ours} == set(MODES)
