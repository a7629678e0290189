"""Reading queries with passages, and the examples that are drawn from them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from bge_pruning.datasets.contrastive_dataset import (
    ContrastiveDataset,
    add_negatives,
    known_positives,
    read_contrastive,
    sample_example,
)
from bge_pruning.datasets.embedding_dataset import Collator, TokenizedTexts
from bge_pruning.datasets.rows import BadRows, Row, RowTable
from bge_pruning.datasets.tables import Table
from bge_pruning.datasets.text_corpus import number_texts

ROWS = [
    {"query": "q1", "pos": ["a"], "neg": ["x", "y", "z"]},
    {"query": "q2", "pos": ["b", "a"], "neg": []},
    {"query": "q3", "pos": ["c"], "neg": ["x"]},
    {"query": "q1", "pos": ["d"], "neg": ["w", "x"]},
]


@pytest.fixture
def write_rows(write) -> Callable[[list | str | bytes], Path]:
    return lambda content: write(content, "rows.jsonl")


def read(path: Path, bad: BadRows | None = None) -> list[Row]:
    return list(read_contrastive(Table(str(path)), bad))


def index_rows(rows: list[Row]) -> tuple[list[str], RowTable]:
    """The different texts in order of appearance, and the rows over them."""
    texts = dict.fromkeys(text for row in rows for text in (row.text, *row.others))
    return list(texts), number_texts(rows)


@pytest.fixture
def indexed(write_rows) -> tuple[list[str], RowTable]:
    return index_rows(read(write_rows(ROWS)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read(name, write):
    rows = [Row(r["query"], (*r["pos"], *r["neg"]), len(r["pos"])) for r in ROWS]
    assert read(write(ROWS, name)) == rows


def test_optional_keys(write_rows):
    row = {"query": "was?", "pos": ["狗"], "neg": ["a", "b"], "prompt": "Frage: "}
    row |= {"type": "unknown", "pos_scores": [1], "neg_scores": [0.5, -2]}
    expected = Row("was?", ("狗", "a", "b"), 1, (1.0, 0.5, -2.0), "Frage: ")
    assert read(write_rows([row])) == [expected]
    del row["neg_scores"]  # scores of a part of the passages are none
    assert read(write_rows([row]))[0].scores is None


GOOD = json.dumps(ROWS[0]) + "\n"


def row(**changes) -> str:
    return json.dumps({**ROWS[0], **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "{", ":2: is not JSON ("),
        (GOOD + '{"query": "a", "pos": ["b"]}', ":2: lacks neg, it has 'query', 'pos'."),
        ("[1]", ":1: lacks query, pos, neg."),
        (row(query=""), ":1: query is empty or no text. To fix"),
        (row(query=3), ":1: query is empty or no text."),
        (row(pos=[]), ":1: pos is empty. To fix, add a passage or remove the line."),
        (row(pos="text"), ":1: pos is not a list. To fix, write a list of texts."),
        (row(pos=["a", " "]), ":1: pos[1] is empty or no text."),
        (row(neg=[None]), ":1: neg[0] is empty or no text."),
        (row(prompt=1), ":1: prompt is empty or no text."),
        (row(pos_scores=[1, 2]), ":1: pos_scores must be 1 numbers, one for each text."),
        (row(neg_scores=["a", 1, 1]), ":1: neg_scores must be 3 numbers, one for each text."),
        (row(neg_scores=[float("nan"), 1, 1]), ":1: neg_scores must be 3 numbers"),
        (row(query="\ud83d"), ":1: query is not UTF-8, or holds half of a surrogate pair."),
        (GOOD.encode() + b'{"query": "\xff"}', ":2: is not UTF-8. To fix, convert the file."),
    ],
)
def test_errors_name_file_and_line(content, message, write_rows):
    path = write_rows(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path) + message)}"):
        read(path)


def positives_of(rows, row):
    """Texts of a row's positives."""
    place = slice(rows.starts[row], rows.starts[row + 1])
    return rows.texts[place][rows.roles[place] == 1]


def test_every_text_is_there_once_and_every_row_is_its_own(indexed):
    texts, rows = indexed
    assert len(set(texts)) == len(texts)
    assert len(rows) == 4
    for index, expected in enumerate(ROWS):
        assert texts[rows.first[index]] == expected["query"]
        assert [texts[i] for i in positives_of(rows, index)] == expected["pos"]
        assert [texts[i] for i in rows.negatives_of(index)] == expected["neg"]


def test_wrong_rows_are_skipped_and_counted(write_rows):
    bad = BadRows(skip=True)
    rows = read(write_rows(GOOD + "{\n" + row(pos=[]) + "\n" + GOOD), bad)
    assert len(rows) == 2
    assert bad.count == 2
    assert "rows.jsonl:3: pos is empty" in bad.examples[1]


def sample(rows: RowTable, *arguments: int) -> np.ndarray:
    return sample_example(rows, *arguments)[0]


def test_an_example_is_query_positive_and_given_negatives(indexed):
    texts, rows = indexed
    query, positive, *negatives = (texts[i] for i in sample(rows, 0, 2, 7, 0))
    assert (query, positive) == ("q1", "a")
    assert len(set(negatives)) == 2
    assert set(negatives) < {"x", "y", "z"}
    assert len(sample(rows, 0, 0, 7, 0)) == 2  # none are asked for


def test_an_example_follows_from_seed_epoch_and_row(indexed):
    _, rows = indexed

    def draws(seed: int, epoch: int) -> list[list[int]]:
        return [sample(rows, r, 2, seed, epoch).tolist() for r in range(4)]

    assert draws(7, 0) == draws(7, 0)
    epochs = [draws(7, epoch)[0] for epoch in range(30)]
    assert len({tuple(e) for e in epochs}) == 6  # ordered pairs of three negatives
    assert {draws(7, epoch)[1][1] for epoch in range(30)} == set(positives_of(rows, 1))
    assert any(draws(7, 0) != draws(seed, 0) for seed in range(8, 12))


def test_too_few_negatives_are_repeated_and_none_stay_none(indexed):
    _, rows = indexed
    assert sample(rows, 2, 3, 7, 0)[2:].tolist() == [rows.negatives_of(2)[0]] * 3
    assert len(sample(rows, 1, 3, 7, 0)) == 2
    counts = np.unique(sample(rows, 3, 5, 7, 0)[2:], return_counts=True)[1]
    assert sorted(counts) == [2, 3]


def test_every_positive_of_a_query_is_known(indexed):
    texts, rows = indexed
    values, bounds = known_positives(rows)
    expected = {"q1": {"a", "d"}, "q2": {"a", "b"}, "q3": {"c"}}  # q1 stands in two rows
    for index, given in enumerate(ROWS):
        found = {texts[i] for i in values[slice(*bounds[index])]}
        assert found == expected[given["query"]]


def tokenized(texts: list[str]) -> TokenizedTexts:
    """Text ``i`` has ``i % 4 + 1`` tokens, all of them ``i``."""
    counts = [i % 4 + 1 for i in range(len(texts))]
    ids = np.repeat(np.arange(len(texts), dtype=np.int32), counts)
    return TokenizedTexts(ids, np.concatenate([[0], np.cumsum(counts)]), 0)


def test_items_of_every_epoch_follow_from_the_index(indexed):
    texts, rows = indexed
    dataset = ContrastiveDataset(tokenized(texts), rows, negatives=0, seed=7)
    assert len(dataset) == 4
    drawn = [sample(rows, index % 4, 0, 7, index // 4) for index in (2, 9)]
    assert dataset.texts_of(np.array([2, 9])).tolist() == np.concatenate(drawn).tolist()
    assert dataset.texts_of(np.array([], int)).tolist() == []
    for index in range(12):
        item = dataset[index]
        expected = sample(rows, index % 4, 0, 7, index // 4)
        assert [int(ids[0]) for ids in item["ids"]] == expected.tolist()
        assert item["passage_texts"].tolist() == expected[1:].tolist()
        assert expected[1] in item["positive_texts"]

    lengths = {text: index % 4 + 1 for index, text in enumerate(texts)}
    # Those of the query and the longest positive.
    expected = [max(lengths[text] for text in (row["query"], *row["pos"])) for row in ROWS]
    assert dataset.lengths.tolist() == expected


def test_negatives_and_scores_that_rows_do_not_have_are_refused(indexed):
    texts, rows = indexed
    message = r"data.negatives is 2, but 1 of 4 rows have no neg. To fix, set it to 0"
    with pytest.raises(ValueError, match=message):
        ContrastiveDataset(tokenized(texts), rows, negatives=2, seed=7)
    message = r"11 passages have no pos_scores or neg_scores, which loss.score_distillation needs"
    with pytest.raises(ValueError, match=message):
        ContrastiveDataset(tokenized(texts), rows, negatives=0, seed=7, scored=True)


def test_a_batch_says_what_is_no_negative(write_rows):
    texts, rows = index_rows(read(write_rows([row for row in ROWS if row["neg"]])))
    vectors = np.arange(2.0 * len(texts), dtype=np.float32).reshape(-1, 2)
    teacher = Mock(items=lambda example: {"teacher_dense_vecs": vectors[example]})
    dataset = ContrastiveDataset(tokenized(texts), rows, negatives=1, seed=7, teacher=teacher)
    batch = Collator(99)([dataset[i] for i in range(3)])
    assert batch["input_ids"].shape[:2] == (3, 3)
    assert batch["passage_texts"].shape == (3, 2)
    q1 = sorted(texts.index(text) for text in ("a", "d"))
    queries = batch["input_ids"][:, 0, 0].tolist()
    # The query itself is no negative either.
    assert batch["positive_texts"].tolist() == [
        [*q1, queries[0]],
        [texts.index("c"), queries[1], -1],
        [*q1, queries[2]],
    ]
    assert batch["teacher_dense_vecs"][:, 0].tolist() == [[2 * q, 2 * q + 1] for q in queries]


def test_a_querys_own_passage_is_no_negative_and_nor_is_what_the_source_leaves_out(indexed):
    texts, rows = indexed
    kept = rows.select(np.array([True, False, False, False]))
    query, own = int(kept.first[0]), len(texts)
    itself = RowTable(np.array([query, own]), np.array([0, 2]), np.array([0]), np.zeros(2))
    tokens = tokenized([*texts, "z"])
    dataset = ContrastiveDataset(tokens, kept, 1, 7, own=itself, in_batch=False)
    plain = ContrastiveDataset(tokens, kept, negatives=1, seed=7)
    known = plain[0]["positive_texts"].tolist()
    assert dataset[0]["positive_texts"].tolist() == [*known[:-1], own, query]
    assert Collator(99)([dataset[0]] * 2)["own_passages_only"].tolist() == [True, True]
    assert "own_passages_only" not in Collator(99)([plain[0]])


def test_pairs_and_triplets_of_single_texts(write):
    path = write("query,pos,neg\nq,p,\nr,s,t\n", "rows.csv")
    assert read(path) == [Row("q", ("p",), 1), Row("r", ("s", "t"), 1)]
    table = Table(str(write("a,b\nq,p\n", "rows.csv")), {"query": "a", "pos": "b"})
    assert list(read_contrastive(table)) == [Row("q", ("p",), 1)]
    with pytest.raises(ValueError, match="csv:1: has 3 columns and no header, expected query, pos"):
        read(write("a man,the man,4.5\n", "rows.csv"))  # scored pairs


def test_scores_go_with_their_passages(write_rows):
    scores = [([9.0] * len(row["pos"]), [*range(len(row["neg"]))]) for row in ROWS]
    both = zip(ROWS, scores, strict=True)
    scored = [{**row, "pos_scores": first, "neg_scores": second} for row, (first, second) in both]
    _, rows = index_rows(read(write_rows(scored)))
    for index, (first, second) in enumerate(scores):
        found = rows.scores[rows.starts[index] + 1 : rows.starts[index + 1]].tolist()
        assert found == [*first, *second]
    for epoch in range(10):
        example, scores = sample_example(rows, 0, 2, 7, epoch)
        order = rows.negatives_of(0).tolist()
        assert scores.tolist() == [9.0, *(order.index(text) for text in example[2:])]
    dataset = ContrastiveDataset(tokenized(list("abcdefghijk")), rows, 0, 7, scored=True)
    assert Collator(99)([dataset[0], dataset[2]])["passage_scores"].tolist() == [[9.0], [9.0]]


def test_negatives_are_added_behind_those_of_the_row(indexed):
    _, rows = indexed
    mined = np.array([[8, -1], [-1, -1], [7, 8], [-1, 6]])
    more = add_negatives(rows, mined)
    for index in range(4):
        added = mined[index][mined[index] >= 0].tolist()
        assert more.negatives_of(index).tolist() == [*rows.negatives_of(index), *added]
        assert positives_of(more, index).tolist() == positives_of(rows, index).tolist()
    assert more.first.tolist() == rows.first.tolist()
    assert np.isnan(more.scores).all()


def test_tokens_are_those_of_the_examples_on_average(indexed):
    texts, rows = indexed
    kept = rows.select(np.array([True, False, True, True]))
    tokens = tokenized(texts)
    dataset = ContrastiveDataset(tokens, kept, negatives=1, seed=7)
    draws = np.array([sum(map(len, dataset[index]["ids"])) for index in range(6000)])
    assert np.allclose(draws.reshape(2000, 3).mean(axis=0), dataset.tokens, atol=0.1)
    assert dataset.width == len(dataset[0]["ids"])
