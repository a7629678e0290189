"""Finding mteb tasks and loading a split of them, without a network."""

import contextlib
import random
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import mteb
import numpy as np
import pytest
import torch
import yaml
from mteb.abstasks import AbsTaskRetrieval

from bge_pruning.datasets.mteb_tasks import data_of, find_task, load_split, random_state_kept
from tests.common.hub import write_dataset

QRELS = [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n in (1, 2)]


def configs_of(prefix: str, qrels: str, splits: dict[str, list]) -> dict:
    """Configurations of a data set as mteb's are on the hub."""
    return {
        f"{prefix}corpus": {"corpus": [{"_id": f"d{n}", "text": f"text {n}"} for n in (1, 2)]},
        f"{prefix}queries": {"queries": [{"_id": f"q{n}", "text": f"query {n}"} for n in (1, 2)]},
        qrels: splits,
    }


@pytest.mark.parametrize("qrels", ["default", "qrels"])
def test_a_split_of_a_task(qrels, serve):
    serve("SciFact", configs_of("", qrels, {"train": QRELS, "test": QRELS[:1]}))
    place, task = load_split("SciFact", "train", None)
    data = data_of(task, "train")
    assert place == "mteb SciFact train"
    assert data["relevant_docs"] == {"q1": {"d1": 1}, "q2": {"d2": 1}}
    assert list(data["queries"]["id"]) == ["q1", "q2"]
    message = r"mteb task 'SciFact' has no split 'dev', but train, test\. To fix, set split to one"
    with pytest.raises(ValueError, match=message):
        load_split("SciFact", "dev", None)


ROOT = Path(__file__).parents[2]
GUIDES = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "data").rglob("*.md"))
# Tasks whose data sets have a split to train on, as published; their metadata do not say.
TRAINED = {"SciFact"}


def test_the_tasks_that_the_guides_name_are_there():
    files = [*GUIDES, *(ROOT / "configs").rglob("*.yaml")]
    texts = [path.read_text(encoding="utf-8") for path in files]
    sources = [row for text in texts for row in re.findall(r"\{[^{}]*kind: mteb[^{}]*\}", text)]
    assert sources
    for row in map(yaml.safe_load, sources):
        task, _ = find_task(row["path"], row.get("split", "train"), row.get("subset"))
        splits = {*task.metadata.eval_splits, *(["train"] if row["path"] in TRAINED else [])}
        assert row.get("split", "train") in splits, row
    judged = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name in ("STSBenchmark", "STS17:en-de", "SciFact", "MIRACLRetrievalHardNegatives:sw"):
        assert f"`{name}`" in judged
        task_name, _, subset = name.partition(":")
        assert (subset or "default") in mteb.get_task(task_name).metadata.hf_subsets


def test_the_subset_of_a_language(serve):
    serve("MIRACLRetrieval", configs_of("sw-", "sw-qrels", {"train": QRELS, "dev": QRELS}))
    place, task = load_split("MIRACLRetrieval", "train", "sw")
    assert place == "mteb MIRACLRetrieval sw train"
    assert len(data_of(task, "train")["corpus"]) == 2


def test_test_queries_are_not_served_as_those_of_another_split(serve):
    serve("SciFact", configs_of("", "default", {"test": QRELS}))
    task = mteb.get_task("SciFact", eval_splits=["train"])
    task.load_data()
    assert task.dataset["default"]["train"]["relevant_docs"]  # what this is about
    message = r"'SciFact' has no split 'train', but test\. To fix, .*; mteb evaluates test\."
    with pytest.raises(ValueError, match=message):
        load_split("SciFact", "train", None)
    assert data_of(load_split("SciFact", "test", None)[1], "test")["relevant_docs"]


FIELDS = {"name": "OwnLoader", "description": "", "type": "Retrieval", "modalities": ["text"]}
FIELDS |= {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "main_score": "ndcg_at_10"}


class OwnLoader(AbsTaskRetrieval):
    """Loads data in its own, older way."""

    metadata = mteb.TaskMetadata(dataset={"path": "own/loader", "revision": "1"}, **FIELDS)

    def load_data(self, **arguments):
        self.queries = {"test": {"q": "query"}}
        self.corpus = {"test": {"d": {"title": "title", "text": f"{random.random()}"}}}
        self.relevant_docs = {"test": {"q": {"d": 1}}}
        self.data_loaded = True


@pytest.fixture
def own_loader(monkeypatch) -> None:
    def get_task(task_name, eval_splits):
        return OwnLoader().filter_eval_splits(eval_splits)

    monkeypatch.setattr(mteb, "get_task", get_task)


def test_a_task_with_its_own_loader(own_loader):
    data, again = (data_of(load_split("OwnLoader", "test", None)[1], "test") for _ in range(2))
    assert data["queries"][0] == {"id": "q", "text": "query"}
    assert again["corpus"][0] == data["corpus"][0]
    with pytest.raises(ValueError, match=r"'OwnLoader' has no split 'train', but test\. To fix"):
        load_split("OwnLoader", "train", None)


@pytest.mark.parametrize("error", [KeyError("train"), ValueError("Unknown split"), RuntimeError()])
def test_a_task_that_cannot_be_loaded(error, own_loader, monkeypatch):
    monkeypatch.setattr(OwnLoader, "load_data", Mock(side_effect=error))
    reason = re.escape(f"({type(error).__name__}: {error})")
    message = f"mteb task 'OwnLoader': cannot load split 'test' of own/loader {reason}\\. To fix"
    with pytest.raises(FileNotFoundError, match=message):
        load_split("OwnLoader", "test", None)


def test_no_network(offline):
    message = (
        r"^mteb task 'SciFact': cannot load split 'train' of mteb/scifact \(ConnectionError: "
        r"Couldn't reach 'mteb/scifact' on the Hub \(OfflineModeIsEnabled\)\)\. To fix, run once "
        r"where the hub can be reached: python -c \"import mteb; mteb\.get_task\('SciFact', "
        r"eval_splits=\['train'\], hf_subsets=\['default'\]\)\.load_data\(\)\", and bring its "
        rf"cache here \({re.escape(str(offline))}\); or get the collection in BEIR layout and use "
        r"kind beir\.$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_split("SciFact", "train", None)


def test_what_was_loaded_before_needs_no_network(offline, tmp_path, monkeypatch):
    configs = configs_of("", "default", {"train": QRELS, "test": QRELS[:1]})
    folder = write_dataset(tmp_path / "scifact", configs)
    with monkeypatch.context() as patch:
        patch.setitem(mteb.get_task("SciFact").metadata.dataset, "path", str(folder))
        expected = data_of(load_split("SciFact", "train", None)[1], "train")
    # As the cache calls a data set that came from the hub.
    (offline / "scifact").rename(offline / "mteb___scifact")
    shutil.rmtree(folder)
    found = data_of(load_split("SciFact", "train", None)[1], "train")
    assert found["relevant_docs"] == expected["relevant_docs"]
    assert list(found["corpus"]) == list(expected["corpus"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scifact", r"no task 'scifact', but (.*, )?SciFact\b.*\. To fix, correct the name"),
        ("miraclretrieval.v2", r"no task 'miraclretrieval.v2', but (.*, )?MIRACLRetrieval\b"),
        ("NanoBEIR", r"no task 'NanoBEIR'"),
        ("MIRACL", r"no task 'MIRACL', but MIRACLReranking, .*MIRACLRetrieval\b"),
        ("Retrieval", r"no task 'Retrieval', but (\S+, ){19}\S+ and \d+ more\. To fix"),
        ("qqqq", r"no task 'qqqq'\. To fix, correct the name"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=rf"mteb \d\S+ has {message}"):
        find_task(name, "train", None)


def test_tasks_of_another_kind():
    kinds = {"STSBenchmark": "STS over text"}
    kinds["VidoreArxivQARetrieval"] = "DocumentUnderstanding over text, image"
    for name, kind in kinds.items():
        message = rf"'{name}' is of type {kind}, expected queries with judged texts\. To fix"
        with pytest.raises(ValueError, match=message):
            find_task(name, "test", None)


def test_subsets():
    for subset, found in ((None, "several subsets"), ("xx", "no subset 'xx'")):
        message = rf"'MIRACLRetrieval' has {found}: ar, bn, de, .*, zh\. To fix, set subset to one"
        with pytest.raises(ValueError, match=message):
            find_task("MIRACLRetrieval", "dev", subset)
    task, subset = find_task("MIRACLRetrieval", "dev", "sw")
    assert (task.hf_subsets, task.eval_splits, subset) == (["sw"], ["dev"], "sw")
    assert find_task("SciFact", "train", None)[1] == "default"


def test_a_run_does_not_notice_what_mteb_seeds(own_loader):
    def draws() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    load_split("OwnLoader", "test", None)
    assert draws() == expected
    seed()
    with contextlib.suppress(KeyError), random_state_kept():
        draws()
        raise KeyError
    assert draws() == expected
