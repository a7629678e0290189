"""Hugging Face datasets in the layouts that published corpora have, read offline from folders."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from bge_pruning.config.schema import ConfigError
from bge_pruning.datasets import tables
from bge_pruning.datasets.contrastive_dataset import read_contrastive
from bge_pruning.datasets.rows import BadRows, Row
from bge_pruning.datasets.sts_dataloader import read_sentences
from bge_pruning.datasets.tables import Table, draw_rows, fingerprint_table, load_table, read_table
from tests.common.hub import jsonl, write_dataset

pytestmark = pytest.mark.usefixtures("offline")

# sentence-transformers/miracl, subset de-triplet-all, in small.
MANY = [
    {"anchor": f"q{i}", "positive": f"p{i}", **{f"negative_{n}": f"n{i} {n}" for n in range(1, 12)}}
    for i in range(3)
]
MANY_COLUMNS = {"query": "anchor", "pos": "positive", "neg": "negative_*"}
# Shitao/MLDR.
NESTED = [
    {
        "query_id": f"q{i}",
        "query": f"what is {i}?",
        "positive_passages": [{"docid": f"d{i}", "text": f"It is {i}."}],
        "negative_passages": [{"docid": f"x{n}", "text": f"no {n}"} for n in range(i)],
    }
    for i in range(3)
]
NESTED_COLUMNS = {"pos": "positive_passages[].text", "neg": "negative_passages[].text"}
# lightonai/ms-marco-en-bge.
IDS = [
    {"query_id": 7, "document_ids": [10, 12, 11], "scores": [0.9, 0.2, 0.1]},
    {"query_id": 3, "document_ids": [11, 10], "scores": [0.8, 0.3]},
]
QUERIES = [{"query_id": str(i), "text": f"query {i}"} for i in (3, 7)]
DOCUMENTS = [{"document_id": i, "text": f"text {i}"} for i in range(9, 13)]
ID_COLUMNS = {
    "query": "query_id",
    "pos": "document_ids[:1]",
    "neg": "document_ids[1:]",
    "pos_scores": "scores[:1]",
    "neg_scores": "scores[1:]",
}


def write_as(kind: str, folder, rows: list[dict]) -> str:
    """A file of rows, or a dataset with that file; returns the path of a source."""
    folder.mkdir(exist_ok=True)
    name = folder / f"rows.{kind.removeprefix('hub ')}"
    if kind.endswith("parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), name)
    elif kind.endswith("csv"):
        lines = [",".join(map(str, row.values())) for row in ({k: k for k in rows[0]}, *rows)]
        name.write_text("\n".join(lines) + "\n")
    else:
        name.write_text(jsonl(rows))
    return f"hf://{folder}" if kind.startswith("hub") else str(name)


def passages_of(path: str, columns: dict[str, str], **options) -> list[Row]:
    return list(read_contrastive(Table(path, columns, **options)))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub jsonl", "hub csv", "hub parquet"])
def test_several_columns_are_one_in_the_order_of_their_numbers(kind, tmp_path):
    rows = passages_of(write_as(kind, tmp_path / "x", MANY), MANY_COLUMNS)
    negatives = tuple(f"n1 {n}" for n in range(1, 12))
    assert rows[1] == Row("q1", ("p1", *negatives), 1)


def test_empty_columns_of_a_pattern_are_no_negatives(tmp_path):
    rows = [{**MANY[0], "negative_2": None, "negative_3": ""}]
    found = passages_of(write_as("hub jsonl", tmp_path / "x", rows), MANY_COLUMNS)
    assert len(found[0].others) == 1 + 11 - 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub jsonl", "hub parquet"])
def test_parts_of_columns(kind, tmp_path):
    rows = passages_of(write_as(kind, tmp_path / "x", NESTED), NESTED_COLUMNS)
    assert rows[2] == Row("what is 2?", ("It is 2.", "no 0", "no 1"), 1)
    assert rows[0] == Row("what is 0?", ("It is 0.",), 1)


def test_lists_of_objects_as_older_datasets_hold_them(tmp_path):
    rows = [{"query": "q", "p": {"docid": ["1", "2"], "text": ["a", "b"]}, "a": {"x": "z"}}]
    path = write_as("hub jsonl", tmp_path / "x", rows)
    assert passages_of(path, {"pos": "p[].text", "neg": "a.x"}) == [Row("q", ("a", "b", "z"), 2)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub jsonl"])
@pytest.mark.parametrize("name", ["negativ", "negatve_*", "negativ[].text"])
def test_a_column_that_is_not_there(kind, name, tmp_path):
    rows = [{"query": "q", "pos": "p", "negative": "n"}]
    path = write_as(kind, tmp_path / "x", rows)
    with pytest.raises(
        ValueError, match=r"(?s)negati?ve?.*(but|has|header).*negative.*To fix|add col"
    ):
        passages_of(path, {"neg": name})
    if kind.startswith("hub"):
        message = r"has no column .*\(did you mean negative\?\), but query, pos, negative\. To fix"
        with pytest.raises(ValueError, match=message):
            passages_of(path, {"neg": name})


@pytest.mark.parametrize("kind", ["jsonl", "hub parquet"])
def test_a_part_that_is_not_there(kind, tmp_path):
    path = write_as(kind, tmp_path / "x", NESTED)
    place = r":1: " if kind == "jsonl" else r":0: "
    message = place + r"positive_passages\[\]\.txt cannot be read .*no 'txt', but docid, text"
    with pytest.raises(ValueError, match=message):
        passages_of(path, {"pos": "positive_passages[].txt"})
    with pytest.raises(ValueError, match=r"query\[\] cannot be read .*To fix, correct columns"):
        passages_of(path, {"pos": "query[]"})


@pytest.mark.parametrize("scores", [list, json.dumps])
def test_ids_are_joined_with_their_texts(scores, tmp_path):
    rows = [{**row, "scores": scores(row["scores"])} for row in IDS]
    configs = {"train": rows, "queries": QUERIES, "documents": DOCUMENTS}
    folder = write_dataset(tmp_path / "x", {c: {"train": r} for c, r in configs.items()})
    path = f"hf://{folder}"
    parts = {"query": "queries", "passage": "documents"}
    collection = {role: Table(path, subset=subset) for role, subset in parts.items()}
    found = passages_of(path, ID_COLUMNS, subset="train", collection=collection)
    assert found == [
        Row("query 7", ("text 10", "text 12", "text 11"), 1, (0.9, 0.2, 0.1)),
        Row("query 3", ("text 11", "text 10"), 1, (0.8, 0.3)),
    ]
    collection["passage"] = Table(path, subset="queries")
    message = r"x:0: hf://.* queries has no text with the id '10'\. To fix"
    with pytest.raises(ValueError, match=message):
        passages_of(path, ID_COLUMNS, subset="train", collection=collection)
    collection["passage"] = Table(path, subset="train")
    with pytest.raises(ValueError, match=r"subset train of the collection needs a column text and"):
        passages_of(path, ID_COLUMNS, subset="train", collection=collection)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_files_of_a_folder(kind, tmp_path):
    """By a pattern, whatever they are; the others are not read."""
    folder = tmp_path / "x"
    write_as("jsonl" if kind == "txt" else kind, folder, [{"text": "a"}, {"text": "b"}])
    if kind == "txt":
        (folder / "rows.txt").write_text("a\nb\n")
    (folder / "other.bin").write_bytes(b"\x00")
    table = Table(f"hf://{folder}", data_files=f"*.{kind}")
    assert list(read_sentences(table)) == [Row("a"), Row("b")]
    first = Table(f"hf://{folder}", split="train[:1]", data_files=f"*.{kind}")
    assert list(read_sentences(first)) == [Row("a")]
    assert fingerprint_table(first) != fingerprint_table(table)


def test_a_parquet_file_that_was_cut_off(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"x\.parquet: is no whole parquet file .*copy it again"):
        list(read_table(Table(str(path)), ("text",), BadRows()))


@pytest.mark.parametrize("name", ["Shitao/MLDR", "miracl/miracl", "unicamp-dl/mmarco"])
def test_names_that_need_a_program(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: pytest.fail("fetches"))
    message = rf"hf://{name}: this data set is read by a program .*To fix, use a copy without one: "
    with pytest.raises(ConfigError, match=message):
        list(read_sentences(Table(f"hf://{name}")))


def test_splits_and_subsets_that_are_not_there(tmp_path):
    configs = {"de-triplet": {"train": MANY}, "en-triplet": {"train": MANY}}
    path = f"hf://{write_dataset(tmp_path / 'x', configs)}"
    for subset, split, message in (
        ("de-triplets", "train", r"no subset de-triplets \(did you mean de-triplet .*, en-triplet"),
        ("de-triplet", "dev", r"cannot load split 'dev' .*it has train\)\. To fix, check name"),
        ("de-triplet", "dev[:2]", r"it has train\)"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_table(Table(path, subset=subset, split=split))


def draw(path: str, tmp_path, count: int, seed: int = 1, name: str = "drawn") -> list[str]:
    drawn = tmp_path / f"{name}.jsonl"
    draw_rows(Table(path, {"text": "body"}), (), ("text",), count, seed, drawn)
    return [json.loads(line)["body"] for line in drawn.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_rows_of_a_stream_are_drawn_by_the_seed(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tables, "BUFFER", 20)
    folder = tmp_path / "x"
    folder.mkdir()
    for part in range(4):
        rows = [{"body": f"text {part} {i}", "url": "u"} for i in range(50)]
        write_as(kind, folder, rows)
        (folder / f"rows.{kind}").rename(folder / f"part-{part}.{kind}")
    path = f"hf://{folder}"
    texts = draw(path, tmp_path, 30)
    assert len(set(texts)) == 30
    assert len({text.split()[1] for text in texts}) > 1  # of several files at once
    assert draw(path, tmp_path, 30) == texts
    assert draw(path, tmp_path, 30, seed=2) != texts
    kept = [p.name for p in tmp_path.rglob("*") if p.is_file() and folder not in p.parents]
    assert [n for n in kept if not n.endswith(".lock")] == ["drawn.jsonl"]  # no other row
    with caplog.at_level("WARNING"):
        assert len(set(draw(path, tmp_path, 1000))) == 200
    assert "holds 200 rows, of which 1000 were asked for" in caplog.text


def test_a_stream_that_cannot_be_drawn_leaves_nothing(tmp_path):
    folder = tmp_path / "x"
    path = write_as("hub jsonl", folder, [{"body": "a"}])
    (folder / "rows.jsonl").write_text('{"body": "a"}\n{"body": \n')
    with pytest.raises(FileNotFoundError, match=r"cannot load split 'train' of this dataset"):
        draw(path, tmp_path, 5)
    (folder / "rows.jsonl").write_text('{"texts": "a"}\n')
    with pytest.raises(ValueError, match=r"has no column body, but texts"):
        draw(path, tmp_path, 5)
    for required, optional in ((("query",), ("neg",)), ((), ("query", "sentence"))):
        with pytest.raises(ValueError, match=r"has no column query.*, but texts\. To fix, name"):
            draw_rows(Table(path), required, optional, 5, 1, tmp_path / "drawn.jsonl")
    assert not list(tmp_path.glob("**/*drawn*"))
