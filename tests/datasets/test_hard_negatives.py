"""Mined negatives against a plain double loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bge_pruning.datasets import hard_negatives
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.datasets.hard_negatives import cached_negatives, mine_negatives, negatives_key
from bge_pruning.datasets.rows import Row
from bge_pruning.datasets.text_corpus import number_texts


def vectors(count: int, seed: int, size: int = 6) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def ragged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum([len(values) for values in lists])
    starts = np.concatenate([[0], ends[:-1]])
    return np.array([v for values in lists for v in values], np.int64), np.stack([starts, ends], 1)


def by_loop(queries, passages, known: list[list[int]], count: int, margin: float) -> np.ndarray:
    found = np.full((len(queries), count), -1)
    for row, query in enumerate(queries):
        scores = [float(query @ passage) for passage in passages]
        lowest = min(scores[index] for index in known[row])
        limit = margin * lowest if lowest > 0 else float("inf")
        allowed = [i for i in range(len(passages)) if i not in known[row] and scores[i] <= limit]
        best = sorted(allowed, key=lambda i: -scores[i])[:count]
        found[row, : len(best)] = best
    return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_they_are_those_of_a_double_loop(data):
    passages = vectors(data.draw(st.integers(2, 40), "passages"), 1)
    queries = vectors(data.draw(st.integers(1, 11), "queries"), 2)
    index = st.integers(0, len(passages) - 1)
    known = [sorted(data.draw(st.sets(index, min_size=1, max_size=4))) for _ in queries]
    count = data.draw(st.integers(1, 12), "count")
    margin = data.draw(st.sampled_from([0.3, 0.8, 0.95, 1.0]), "margin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hard_negatives, "QUERIES", data.draw(st.integers(1, 12)))
        patch.setattr(hard_negatives, "PASSAGES", data.draw(st.integers(1, 41)))
        found = mine_negatives(queries, passages, ragged(known), count, margin)
    assert found.tolist() == by_loop(queries, passages, known, count, margin).tolist()


def test_a_copy_of_the_positive_is_left_out():
    passages = vectors(5, 1)
    passages[3] = passages[1]
    query = passages[1:2]
    found = mine_negatives(query, passages, ragged([[1]]), 4, 1.0 - 1e-3)
    assert sorted(found[0]) == [-1, 0, 2, 4]


def test_they_are_kept(tmp_path):
    calls = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.array([[1, -1]])

    path = tmp_path / "new" / "negatives.npy"
    for _ in range(2):
        assert cached_negatives(path, compute).tolist() == [[1, -1]]
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"negatives.npy: damaged .*To fix, delete it"):
        cached_negatives(path, compute)


def test_the_key_follows_all_that_they_depend_on():
    texts = TokenizedTexts(np.arange(6, dtype=np.int32), np.array([0, 2, 4, 6]), 0)
    rows = number_texts([Row("a", ("b", "c"), 1)])
    base = negatives_key(texts, rows, "m", (5, 0.95))
    longer = TokenizedTexts(texts.ids + 1, texts.starts, 0)
    others = {
        negatives_key(longer, rows, "m", (5, 0.95)),
        negatives_key(texts, number_texts([Row("a", ("b", "c"), 2)]), "m", (5, 0.95)),
        negatives_key(texts, rows, "n", (5, 0.95)),
        negatives_key(texts, rows, "m", (4, 0.95)),
        negatives_key(texts, rows, "m", (5, 0.9)),
    }
    assert len(others | {base}) == 6
    assert negatives_key(texts, rows, "m", (5, 0.95)) == base
