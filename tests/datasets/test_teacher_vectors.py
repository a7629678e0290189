"""The teacher's vectors: in the right order, computed once, and kept as a whole or not at all."""

import re
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from bge_pruning.datasets import teacher_vectors
from bge_pruning.datasets.embedding_dataset import Collator, EmbeddingDataset, TokenizedTexts
from bge_pruning.datasets.teacher_vectors import (
    BATCH_TEXTS,
    cached_teacher_outputs,
    compute_cache_key,
    compute_digest,
    encode_texts,
    load_array,
    new_arrays,
    save_array,
)

PAD = 1
WEIGHTS = torch.rand(99, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_texts(rows: list[list[int]]) -> TokenizedTexts:
    ids = np.array([i for row in rows for i in row], dtype=np.int32)
    return TokenizedTexts(ids, np.cumsum([0, *map(len, rows)]), 0)


NAMES = ("dense_vecs",)
TOKEN_NAMES = ("dense_vecs", "token_weights", "colbert_vecs")


def encode(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum of token vectors: what padding adds is seen unless the mask takes it away."""
    return {"dense_vecs": (WEIGHTS[ids] * mask[..., None]).sum(1)}


def cached(texts: TokenizedTexts, encode, pad: int, path: Path) -> np.ndarray:
    return cached_teacher_outputs(texts, encode, pad, {"dense_vecs": path})["dense_vecs"]


@pytest.fixture
def rows() -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, size=150)
    return [generator.integers(4, 99, size=length).tolist() for length in lengths]


@pytest.fixture
def spy() -> Mock:
    """The encoder, which also keeps what it was given."""
    return Mock(side_effect=encode_tokens)


def calls(spy: Mock) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [call.args for call in spy.call_args_list]


def test_vectors_are_in_the_order_of_the_texts(rows):
    vectors = encode_texts(make_texts(rows), encode, PAD, NAMES)["dense_vecs"]
    expected = torch.stack([WEIGHTS[row].sum(0) for row in rows])
    np.testing.assert_allclose(vectors, expected.float().numpy(), rtol=1e-6)
    assert vectors.dtype == np.float32


def test_batches_are_of_similar_length_and_padded(rows, spy):
    encode_texts(make_texts(rows), spy, PAD, NAMES)
    sizes, lengths = [tuple(ids.shape) for ids, _ in calls(spy)], sorted(map(len, rows))
    assert sizes == [(BATCH_TEXTS, lengths[63]), (BATCH_TEXTS, lengths[127]), (22, lengths[149])]
    for ids, mask in calls(spy):
        assert ids.dtype == mask.dtype == torch.int64
        assert torch.equal(mask.bool(), ids != PAD)  # these texts hold no padding token


def test_the_teacher_sees_what_it_would_see_in_a_training_batch(spy):
    """A text may spell out the padding token; the two ways to get vectors must agree on it."""
    texts = make_texts([[0, 5, 2], [0, 5, PAD, 6, 2]])
    encode_texts(texts, spy, PAD, NAMES)
    encode_texts(texts, spy, 42, NAMES)
    dataset = EmbeddingDataset(texts, np.array([[0], [1]]))
    batch = Collator(PAD)([dataset[0], dataset[1]])
    (ids, mask), (other, _) = calls(spy)
    assert torch.equal(ids, batch["input_ids"].squeeze(1))
    assert torch.equal(mask, batch["attention_mask"].squeeze(1))
    assert other.tolist() == [[0, 5, 2, 42, 42], [0, 5, PAD, 6, 2]]


def test_half_precision_vectors_become_float32(rows):
    def half(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"dense_vecs": encode(ids, mask)["dense_vecs"].bfloat16()}

    vectors = encode_texts(make_texts(rows), half, PAD, NAMES)["dense_vecs"]
    assert vectors.dtype == np.float32
    expected = torch.stack([WEIGHTS[row].sum(0) for row in rows])
    np.testing.assert_allclose(vectors, expected.numpy(), rtol=2**-8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "here" / "teacher-abc.npy"


def test_computed_once_then_read(rows, spy, path):
    texts = make_texts(rows)
    first = cached(texts, spy, PAD, path)
    assert len(calls(spy)) == 3
    second = cached(texts, spy, PAD, path)
    assert len(calls(spy)) == 3
    assert np.array_equal(first, second)
    assert np.array_equal(first, encode_texts(texts, encode, PAD, NAMES)["dense_vecs"])
    assert [p.name for p in path.parent.iterdir()] == ["teacher-abc.npy"]
    assert isinstance(second, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second[0, 0] = 1.0


def test_what_another_process_was_quicker_with_is_read(rows, spy, path, monkeypatch):
    texts = make_texts(rows)

    @contextmanager
    def waited(file):
        file.parent.mkdir(parents=True)
        with new_arrays({"dense_vecs": file}) as allocate:
            encode_texts(texts, encode, PAD, NAMES, allocate)
        yield

    monkeypatch.setattr(teacher_vectors, "lock_of", waited)
    assert len(cached(texts, spy, PAD, path)) == len(rows)
    assert not calls(spy)


def test_a_teacher_that_fails_leaves_nothing(rows, path):
    with pytest.raises(RuntimeError, match="no memory"):
        cached(make_texts(rows), Mock(side_effect=RuntimeError("no memory")), PAD, path)
    assert list(path.parent.iterdir()) == []


def test_a_full_disk_leaves_nothing(rows, path, monkeypatch):
    """Writing into a mapped file that has no room would end the process."""
    full = Mock(side_effect=OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(teacher_vectors.os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            cached(make_texts(rows), encode, PAD, path)
    assert list(path.parent.iterdir()) == []
    assert len(cached(make_texts(rows), encode, PAD, path)) == len(rows)


def test_key_is_stable_and_changes_with_teacher_tokens_boundaries_order_and_layout(monkeypatch):
    texts = make_texts([[4, 5], [6]])
    others = ([[4, 5], [7]], [[4], [5, 6]], [[6], [4, 5]], [[4, 5], [6], []])
    keys = {compute_cache_key(make_texts(other), "teacher") for other in others}
    keys |= {compute_cache_key(texts, teacher) for teacher in ("teacher", "teacher", "another")}
    monkeypatch.setattr(teacher_vectors, "FORMAT", teacher_vectors.FORMAT + 1)
    keys.add(compute_cache_key(texts, "teacher"))
    assert len(keys) == 7
    assert all(re.fullmatch("[0-9a-f]{24}", key) for key in keys)


def encode_tokens(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight and a vector that follow from the token; nonsense in the padding."""
    weights = torch.where(mask.bool(), ids.double(), torch.tensor(-7.0).double())
    vectors = torch.where(mask[:, 1:, None].bool(), WEIGHTS[ids[:, 1:]], 9.0)
    return {**encode(ids, mask), "token_weights": weights, "colbert_vecs": vectors}


def test_tokens_are_laid_out_as_the_ids(rows):
    texts = make_texts(rows)
    outputs = encode_texts(texts, encode_tokens, PAD, TOKEN_NAMES)
    assert np.array_equal(outputs["token_weights"], texts.ids.astype(np.float32))
    assert outputs["colbert_vecs"].dtype == np.float16
    for number, row in enumerate(rows):
        found = outputs["colbert_vecs"][texts.starts[number] : texts.starts[number + 1]]
        assert not found[0].any()  # CLS has none
        np.testing.assert_allclose(found[1:], WEIGHTS[row[1:]].numpy(), atol=1e-3)


def test_what_is_missing_is_made_and_the_rest_is_kept(rows, spy, tmp_path):
    texts = make_texts(rows)
    paths = {name: tmp_path / f"{name}.npy" for name in TOKEN_NAMES}
    cached_teacher_outputs(texts, spy, PAD, {"dense_vecs": paths["dense_vecs"]})
    before = paths["dense_vecs"].stat().st_mtime_ns
    outputs = cached_teacher_outputs(texts, spy, PAD, paths)
    assert len(calls(spy)) == 6  # all outputs that are missing come from one run of the teacher
    assert paths["dense_vecs"].stat().st_mtime_ns == before
    assert set(outputs) == set(TOKEN_NAMES)
    cached_teacher_outputs(texts, spy, PAD, paths)
    assert len(calls(spy)) == 6


def test_tokens_from_disk_are_those_of_the_teacher_in_a_batch(rows, tmp_path):
    texts = make_texts([row for row in rows if len(row) > 1][:6])
    paths = {name: tmp_path / f"{name}.npy" for name in TOKEN_NAMES}
    teacher = cached_teacher_outputs(texts, encode_tokens, PAD, paths)
    dataset = EmbeddingDataset(texts, np.array([[0, 1], [2, 3], [4, 5]]), teacher=teacher)
    batch = Collator(PAD)([dataset[i] for i in range(3)])
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    live = encode_tokens(ids, mask)
    weights = live["token_weights"] * mask
    vectors = live["colbert_vecs"] * mask[:, 1:, None]
    found = batch["teacher_colbert_vecs"].flatten(0, 1).double()
    assert torch.equal(batch["teacher_token_weights"].flatten(0, 1).double(), weights)
    torch.testing.assert_close(found, vectors, atol=1e-3, rtol=0)


# Arrays on disk are whole or not there


def test_round_trip(tmp_path):
    path = tmp_path / "a" / "b" / "x.npy"
    for array in (np.arange(3), np.ones((2, 2), np.float16)):
        save_array(array, path)
        loaded = load_array(path)
        assert isinstance(loaded, np.memmap) and loaded.dtype == array.dtype
        assert (loaded == array).all()


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    def fail(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_array(np.arange(3), tmp_path / "x.npy")

    def fill() -> None:
        with new_arrays({"a": tmp_path / "a.npy"}) as allocate:
            allocate("a", (3,), np.float32)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fill()
    assert not list(tmp_path.iterdir())


def test_arrays_are_filled_in_place_and_named_at_the_end(tmp_path):
    paths = {name: tmp_path / "new" / f"{name}.npy" for name in ("a", "b", "unused")}
    with new_arrays(paths) as allocate:
        for name, dtype in (("a", np.float32), ("b", np.float16)):
            array = allocate(name, (3, 2), dtype)
            assert (array == 0).all()
            array[1] = 7
        assert not any(path.is_file() for path in paths.values())
    for name, dtype in (("a", np.float32), ("b", np.float16)):
        assert load_array(paths[name]).tolist() == [[0, 0], [7, 7], [0, 0]]
        assert load_array(paths[name]).dtype == dtype
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.npy", "b.npy"]


def test_damaged_files(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100))
    other_version = path.read_bytes()
    save_array(np.arange(100), path)
    whole = path.read_bytes()
    changed = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]  # NumPy would read it
    contents = {b"": "it is too short", b"text": "it is too short", whole[:200]: "", whole[:-1]: ""}
    contents[changed] = "its checksum is not that of its content"
    contents[other_version] = "it does not end with the mark of version 1"
    for content, reason in contents.items():
        path.write_bytes(content)
        message = rf"^{re.escape(str(path))}: damaged or not complete \({reason}.*To fix, delete"
        with pytest.raises(ValueError, match=message):
            load_array(path)


def test_the_checksum_of_a_large_file_is_of_blocks_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_vectors, "BLOCK", 16)
    monkeypatch.setattr(teacher_vectors, "BLOCKS", 4)
    path = tmp_path / "x"
    content = bytearray(16 * 100 + 3)
    path.write_bytes(content)
    before = compute_digest(path, len(content))
    for place, noticed in ((0, True), (len(content) - 1, True), (17, False), (33 * 16, True)):
        path.write_bytes(content[:place] + b"x" + content[place + 1 :])
        assert (compute_digest(path, len(content)) != before) == noticed
    path.write_bytes(content)
    assert compute_digest(path, len(content) - 1) != before
