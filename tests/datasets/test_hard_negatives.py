"""Hard negatives: the same as a plain double loop finds, whatever the chunks."""

import re
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.datasets.hard_negatives import cached_negatives, mine_negatives, negatives_key
from bge_pruning.datasets.rows import RowTable
from bge_pruning.datasets.teacher_vectors import TeacherCache, Vectors


def mine_slowly(queries, passages, known, count, margin) -> np.ndarray:
    result = np.full((len(queries), count), -1)
    for row, (query, positives) in enumerate(zip(queries.tolist(), known, strict=True)):
        scores = [sum(a * b for a, b in zip(query, p, strict=True)) for p in passages.tolist()]
        best = max((scores[p] for p in positives), default=0)
        candidates = [p for p in range(len(passages)) if p not in positives]
        candidates.sort(key=lambda p: (-scores[p], p))
        # The bound as a float32 computes it: the products are exact, 0.95 of one is not.
        bound = float(np.float32(best) * np.float32(margin)) if best > 0 else float("inf")
        for place, p in enumerate([p for p in candidates if scores[p] <= bound][:count]):
            result[row, place] = p
    return result


def ragged(known: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.cumsum([len(positives) for positives in known])
    starts = ends - [len(positives) for positives in known]
    values = np.array([p for positives in known for p in positives], np.int64)
    return values, np.stack([starts, ends], axis=1)


@st.composite
def cases(draw) -> dict:
    """Small whole numbers, whose products are exact in any order, with many equal scores."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, p = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    passages = numbers.integers(-2, 3, (p, 3))
    counts = numbers.integers(0, min(p, 4) + 1, q)
    return {
        "queries": numbers.integers(-2, 3, (q, 3)),
        "passages": passages,
        "known": [sorted(numbers.choice(p, n, replace=False).tolist()) for n in counts],
        "count": draw(st.integers(1, 6)),
        "margin": draw(st.sampled_from([0.25, 0.5, 0.95, 1.0])),
    }


def test_vectors_on_disk_are_read_in_blocks_and_a_killed_process_goes_on(tmp_path, monkeypatch):
    numbers = np.random.default_rng(3)
    vectors = numbers.integers(-9, 9, (60, 4)).astype(np.float32)
    order = numbers.permutation(60)
    texts = TokenizedTexts(np.zeros(60, np.int32), np.arange(61), 0)
    cache = TeacherCache(texts, tmp_path / "teacher", ("dense_vecs",))
    for part in (order[:25], order[25:]):
        cache.add(part, {"dense_vecs": vectors[part]})
    sizes, ends, read = [], [], type(cache.outputs["dense_vecs"]).read

    def look(self, wanted):
        sizes.append(len(wanted))
        if sizes.count(7) == 12:  # in the second chunk of queries
            ends.append(1)
            raise KeyboardInterrupt
        return read(self, wanted)

    monkeypatch.setattr(type(cache.outputs["dense_vecs"]), "read", look)
    both = Vectors(cache.outputs["dense_vecs"], np.arange(60))
    known = ragged([[n % 40] for n in range(20)])
    arguments = (both[:20], both[20:], known, 3, 0.95, 7)
    assert both.shape == (60, 4)
    with pytest.raises(KeyboardInterrupt):
        mine_negatives(*arguments, parts=tmp_path / "parts")
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("*.npy")}
    assert [path.name for path in done] == ["0-7.npy"]
    found = mine_negatives(*arguments, parts=tmp_path / "parts")
    assert max(sizes) == 7 and ends
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert (found == mine_negatives(vectors[:20], vectors[20:], known, 3, 0.95, 7)).all()


@given(case=cases(), chunk=st.integers(1, 50))
def test_the_same_as_a_double_loop(case, chunk):
    expected = mine_slowly(**case)
    queries, passages = (case.pop(n).astype(np.float32) for n in ("queries", "passages"))
    known, options = ragged(case["known"]), (case["count"], case["margin"], chunk)
    found = mine_negatives(queries, passages, known, *options)
    assert found.dtype == np.int64
    assert found.tolist() == expected.tolist()


def unit_vectors(numbers: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = numbers.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_embeddings_from_a_file(tmp_path):
    """Read-only maps, vectors as a model gives them, and positives shared by queries."""
    numbers = np.random.default_rng(3)
    np.save(tmp_path / "x.npy", unit_vectors(numbers, 530, 16))
    vectors = np.load(tmp_path / "x.npy", mmap_mode="r")
    queries, passages = vectors[:30], vectors[30:]
    values = numbers.permutation(500)[:60]
    bounds = np.repeat(np.arange(0, 60, 4), 2)[:, None] + [0, 4]
    found = mine_negatives(queries, passages, (values, bounds), 5, 0.9, 128)
    scores = queries @ passages.T
    for row in range(30):
        positives = values[bounds[row, 0] : bounds[row, 1]]
        best = scores[row, positives].max()
        order = [p for p in np.argsort(-scores[row]) if p not in positives]
        wanted = [p for p in order if best <= 0 or scores[row, p] <= 0.9 * best][:5]
        assert found[row].tolist() == wanted + [-1] * (5 - len(wanted))
    assert (found >= 0).all()


def angle(degrees: float) -> list[float]:
    return [np.cos(np.radians(degrees)), np.sin(np.radians(degrees))]


def mine(passages: list[float], positives: list[int], **arguments) -> list[int]:
    """For a query at 0 degrees, of passages at other angles."""
    queries = np.array([angle(0)], np.float32)
    vectors = np.array([angle(degrees) for degrees in passages], np.float32)
    return mine_negatives(queries, vectors, ragged([positives]), **arguments)[0].tolist()


def test_passages_too_similar_to_be_negatives_are_left_out():
    # cos 30 = 0.866, of which 0.95 is 0.823 = cos 34.6.
    assert mine([30, 33, 36, 20, 50], [0], count=3) == [2, 4, -1]
    assert mine([30, 33, 36, 20, 50], [0], count=3, margin=1.0) == [1, 2, 4]
    assert mine([30, 33, 36, 20, 50], [0, 3], count=3) == [1, 2, 4]  # the best positive counts
    assert mine([60, 10, 20, 70, 80], [0], count=2) == [3, 4]
    # A positive that is not similar, or none, sets no bound.
    assert mine([95, 80, 30], [0], count=2) == [2, 1]
    assert mine([95, 80, 30], [], count=2) == [2, 1]


def test_equal_passages_come_in_order_and_there_may_be_none():
    assert mine([30, 50, 50, 50, 30], [0], count=2, chunk=2) == [1, 2]
    # The last one scores as the positive does, so it is left out.
    assert mine([30, 50, 50, 50, 30], [0], count=5, chunk=3) == [1, 2, 3, -1, -1]
    empty = np.empty((0, 2), np.float32)
    bounds = np.empty((0, 2), np.int64)
    assert mine_negatives(empty, empty, (np.empty(0, np.int64), bounds), 3).shape == (0, 3)
    assert mine([30], [0], count=2) == [-1, -1]


def test_no_more_than_a_chunk_of_scores_is_held(monkeypatch):
    sizes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: sizes.append((len(a), b.shape[1])) or matmul(a, b)
    )
    vectors = unit_vectors(np.random.default_rng(0), 25, 4)
    mine_negatives(vectors, vectors, ragged([[0]] * 25), 2, chunk=10)
    assert sizes == [(q, p) for q in (10, 10, 5) for p in (10, 10, 5)]


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    numbers = np.random.default_rng(4)
    queries, passages = (numbers.integers(-3, 4, (n, 8)).astype(np.float32) for n in (70, 3000))
    known = ragged([[row, 2 * row] for row in range(70)])
    arguments = (queries, passages, known, 7, 0.8, 512)
    assert (mine_negatives(*arguments) == mine_negatives(*arguments, device="cuda")).all()


def test_vectors_that_are_not_finite_or_of_two_models():
    for wrong, kind in enumerate(("query", "passage")):
        vectors = [np.ones((3, 2), np.float32) for _ in range(2)]
        vectors[wrong][2, 1] = np.nan
        message = rf"^{kind} vectors hold values that are not finite\. To fix, check the model"
        with pytest.raises(ValueError, match=message):
            mine_negatives(*vectors, ragged([[0]] * 3), 1)
    message = r"query vectors have 2 dimensions, passage vectors 3\. To fix, embed both"
    with pytest.raises(ValueError, match=message):
        mine_negatives(np.ones((1, 2)), np.ones((1, 3)), ragged([[0]]), 1)


def test_the_cache_is_computed_once(tmp_path):
    path, compute = tmp_path / "new" / "negatives-x.npy", Mock(return_value=np.array([[3, -1]]))
    assert [cached_negatives(path, compute).tolist() for _ in range(2)] == [[[3, -1]]] * 2
    compute.assert_called_once()
    assert [file.name for file in path.parent.iterdir()] == ["negatives-x.npy"]


def test_the_key_is_of_all_that_negatives_depend_on():
    def key(ids=(1, 2), starts=(0, 1, 2), rows=(0, 1), positives=(1,), model="m", margin=0.9):
        texts = TokenizedTexts(np.array(ids, np.int32), np.array(starts), 0)
        table = RowTable(np.array(rows), np.array([0, 2]), np.array(positives), np.zeros(2))
        return negatives_key(texts, table, model, (2, margin))

    changed = [key(), key(ids=(1, 3)), key(starts=(0, 2, 2)), key(rows=(1, 0))]
    changed += [key(positives=(0,)), key(model="other"), key(margin=0.95)]
    assert len({*changed, key()}) == len(changed)
    assert re.fullmatch("[0-9a-f]{24}", key())
