"""Rows with named columns, from files and from Hugging Face datasets."""

import pytest

from bge_pruning.datasets.contrastive_dataset import read_contrastive
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.sts_dataloader import read_pairs, read_sentences
from bge_pruning.datasets.tables import Table, fingerprint_table, read_table
from tests.common.hub import write_dataset

PAIRS = [{"a": "one", "b": "two", "label": 1.0}, {"a": "drei", "b": "狗", "label": 0.5}]
COLUMNS = {"sentence1": "a", "sentence2": "b", "score": "label"}


@pytest.fixture
def hub_dataset(tmp_path, monkeypatch) -> str:
    """A dataset folder as the hub holds one, read through the real library without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    configs = {"default": {"train": PAIRS, "test": PAIRS[:1]}}
    return f"hf://{write_dataset(tmp_path / 'pairs', configs)}"


def cells(table: Table, required: tuple[str, ...], **options) -> list[dict]:
    return [row for _, row in read_table(table, required, BadRows(), **options)]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz", "x.jsonl", "x.jsonl.gz"])
def test_columns_have_our_names(name, write):
    if "jsonl" in name:
        text = '{"b": "two", "id": 7, "a": "one"}\n'
    else:
        text = "b,id,a\ntwo,7,one\n".replace(",", "\t" if "tsv" in name else ",")
    table = Table(str(write(text, name)), {"first": "a"})
    assert cells(table, ("first",), optional=("b", "c")) == [{"first": "one", "b": "two"}]


def test_places_are_named(write):
    path = write('a,b\n"one\ntwo",3\n4,5\n', "x.csv")
    found = [where for where, _ in read_table(Table(str(path)), ("a",), BadRows())]
    assert found == [f"{path}:3", f"{path}:4"]


def test_pairs_of_a_dataset(hub_dataset):
    table = Table(hub_dataset, COLUMNS)
    rows = [Row("one", ("two",), scores=(1.0,)), Row("drei", ("狗",), scores=(0.5,))]
    assert list(read_pairs(table, (0.0, 1.0))) == rows
    assert len(list(read_pairs(Table(hub_dataset, COLUMNS, split="test"), (0.0, 1.0)))) == 1
    with pytest.raises(ValueError, match=r"pairs:0: score '1.0' is not a number in \[0, 0.9\]"):
        list(read_pairs(table, (0.0, 0.9)))


def test_other_kinds_and_missing_columns_of_a_dataset(hub_dataset):
    passages = Table(hub_dataset, {"query": "a", "pos": "b"})
    assert list(read_contrastive(passages))[1] == Row("drei", ("狗",), 1)
    assert list(read_sentences(Table(hub_dataset, {"text": "b"}))) == [Row("two"), Row("狗")]
    message = r"has no column score, but a, b, label\. To fix, name them under columns"
    with pytest.raises(ValueError, match=message):
        list(read_pairs(Table(hub_dataset, {"sentence1": "a", "sentence2": "b"})))


def test_a_dataset_that_cannot_be_had(hub_dataset, monkeypatch):
    """Without a network, and without waiting for one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    absent = ((f"{hub_dataset}-none", "train"), (hub_dataset, "dev"), ("hf://nobody/x", "train"))
    for path, split in absent:
        with pytest.raises(FileNotFoundError, match=r"cannot load split .*To fix, check name"):
            list(read_pairs(Table(path, COLUMNS, split)))


def test_fingerprints_follow_the_content(hub_dataset, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b,1\n")
    before = fingerprint_table(Table(str(path)))
    path.write_text("a,b,2\n")
    assert fingerprint_table(Table(str(path))) != before
    train, test = (fingerprint_table(Table(hub_dataset, split=s)) for s in ("train", "test"))
    assert train != test
    assert fingerprint_table(Table(hub_dataset)) == train
