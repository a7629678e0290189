"""The teacher's vectors: in the right order, computed once, and kept as a whole or not at all."""

import re

import numpy as np
import pytest
import torch

from bge_pruning.datasets import teacher_vectors
from bge_pruning.datasets.embedding_dataset import Collator, EmbeddingDataset, TokenizedTexts
from bge_pruning.datasets.teacher_vectors import (
    BATCH_TEXTS,
    cached_teacher_vectors,
    compute_cache_key,
    encode_texts,
)

PAD = 1
WEIGHTS = torch.rand(99, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_texts(rows: list[list[int]]) -> TokenizedTexts:
    ids = np.array([i for row in rows for i in row], dtype=np.int32)
    return TokenizedTexts(ids, np.cumsum([0, *map(len, rows)]), 0)


def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of token vectors: what padding adds is seen unless the mask takes it away."""
    return (WEIGHTS[ids] * mask[..., None]).sum(1)


@pytest.fixture
def rows() -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, size=150)
    return [generator.integers(4, 99, size=length).tolist() for length in lengths]


@pytest.fixture
def calls() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return []


@pytest.fixture
def spy(calls):
    """The encoder, which also keeps what it was given."""

    def spy(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append((ids, mask))
        return encode(ids, mask)

    return spy


# Encoding


def test_vectors_are_in_the_order_of_the_texts(rows):
    vectors = encode_texts(make_texts(rows), encode, PAD)
    expected = torch.stack([WEIGHTS[row].sum(0) for row in rows])
    np.testing.assert_allclose(vectors, expected.float().numpy(), rtol=1e-6)
    assert vectors.dtype == np.float32


def test_batches_are_of_similar_length_and_padded(rows, spy, calls):
    encode_texts(make_texts(rows), spy, PAD)
    assert [len(ids) for ids, _ in calls] == [BATCH_TEXTS, BATCH_TEXTS, 150 - 2 * BATCH_TEXTS]
    lengths = sorted(map(len, rows))
    assert [ids.shape[1] for ids, _ in calls] == [lengths[63], lengths[127], lengths[149]]
    for ids, mask in calls:
        assert ids.dtype == mask.dtype == torch.int64
        assert torch.equal(mask.bool(), ids != PAD)  # these texts hold no padding token


def test_another_padding_token(spy, calls):
    encode_texts(make_texts([[5], [5, 6, 7]]), spy, 42)
    ((ids, mask),) = calls
    assert ids.tolist() == [[5, 42, 42], [5, 6, 7]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_the_teacher_sees_what_it_would_see_in_a_training_batch(spy, calls):
    """A text may spell out the padding token; the two ways to get vectors must agree on it."""
    texts = make_texts([[0, 5, 2], [0, 5, PAD, 6, 2]])
    encode_texts(texts, spy, PAD)
    dataset = EmbeddingDataset(texts, np.array([[0], [1]]))
    batch = Collator(PAD)([dataset[0], dataset[1]])
    ((ids, mask),) = calls
    assert torch.equal(ids, batch["input_ids"].squeeze(1))
    assert torch.equal(mask, batch["attention_mask"].squeeze(1))


def test_half_precision_vectors_become_float32(rows):
    vectors = encode_texts(make_texts(rows), lambda i, m: encode(i, m).bfloat16(), PAD)
    assert vectors.dtype == np.float32
    expected = torch.stack([WEIGHTS[row].sum(0) for row in rows])
    np.testing.assert_allclose(vectors, expected.numpy(), rtol=2**-8)


# The cache


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "here" / "teacher-abc.npy"


def test_computed_once_then_read(rows, spy, calls, path):
    texts = make_texts(rows)
    first = cached_teacher_vectors(texts, spy, PAD, path)
    assert len(calls) == 3
    second = cached_teacher_vectors(texts, spy, PAD, path)
    assert len(calls) == 3
    assert np.array_equal(first, second)
    assert np.array_equal(first, encode_texts(texts, encode, PAD))
    assert [p.name for p in path.parent.iterdir()] == ["teacher-abc.npy"]


def test_the_file_is_mapped_and_cannot_be_written_to(rows, path):
    vectors = cached_teacher_vectors(make_texts(rows), encode, PAD, path)
    assert isinstance(vectors, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        vectors[0, 0] = 1.0


def test_a_teacher_that_fails_leaves_nothing(rows, path):
    def fail(ids, mask):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        cached_teacher_vectors(make_texts(rows), fail, PAD, path)
    assert not path.parent.exists()


def test_a_full_disk_leaves_nothing(rows, path, monkeypatch):
    def save(file, vectors):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_vectors.np, "save", save)
        with pytest.raises(OSError, match="No space left"):
            cached_teacher_vectors(make_texts(rows), encode, PAD, path)
    assert list(path.parent.iterdir()) == []
    assert len(cached_teacher_vectors(make_texts(rows), encode, PAD, path)) == len(rows)


@pytest.mark.parametrize("kept", [0, 100, -1], ids=["empty", "header cut", "one byte short"])
def test_a_damaged_file_is_named(kept, rows, path):
    texts = make_texts(rows)
    cached_teacher_vectors(texts, encode, PAD, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: damaged.*To fix, delete"):
        cached_teacher_vectors(texts, encode, PAD, path)


# Its key


def test_key_is_stable_and_fits_a_file_name(rows):
    key = compute_cache_key(make_texts(rows), "teacher")
    assert key == compute_cache_key(make_texts(rows), "teacher")
    assert re.fullmatch("[0-9a-f]{24}", key)


def test_key_changes_with_teacher_tokens_boundaries_order_and_layout(monkeypatch):
    texts = make_texts([[4, 5], [6]])
    keys = {
        compute_cache_key(texts, "teacher"),
        compute_cache_key(texts, "another"),
        compute_cache_key(make_texts([[4, 5], [7]]), "teacher"),
        compute_cache_key(make_texts([[4], [5, 6]]), "teacher"),
        compute_cache_key(make_texts([[6], [4, 5]]), "teacher"),
        compute_cache_key(make_texts([[4, 5], [6], []]), "teacher"),
    }
    monkeypatch.setattr(teacher_vectors, "FORMAT", teacher_vectors.FORMAT + 1)
    keys.add(compute_cache_key(texts, "teacher"))
    assert len(keys) == 7
