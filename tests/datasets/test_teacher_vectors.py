"""The teacher's outputs: of the right texts, computed once, and kept piece by piece."""

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
    TeacherCache,
    compute_cache_bytes,
    compute_cache_key,
)

PAD = 1
WEIGHTS = torch.rand(99, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NAMES = ("dense_vecs",)
TOKEN_NAMES = ("dense_vecs", "token_weights", "colbert_vecs")


def make_texts(rows: list[list[int]]) -> TokenizedTexts:
    ids = np.array([i for row in rows for i in row], dtype=np.int32)
    return TokenizedTexts(ids, np.cumsum([0, *map(len, rows)]), 0)


def encode(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A vector, a weight and vectors of tokens that follow from the ids; nonsense in the padding.

    What padding adds to a sum is seen unless the mask takes it away.
    """
    weights = torch.where(mask.bool(), ids.double(), torch.tensor(-7.0).double())
    vectors = torch.where(mask[:, 1:, None].bool(), WEIGHTS[ids[:, 1:]], 9.0)
    dense = (WEIGHTS[ids] * mask[..., None]).sum(1)
    return {"dense_vecs": dense, "token_weights": weights, "colbert_vecs": vectors}


@pytest.fixture
def rows() -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 40, size=150)
    return [generator.integers(4, 99, size=length).tolist() for length in lengths]


@pytest.fixture
def spy() -> Mock:
    """The encoder, which also keeps what it was given."""
    return Mock(side_effect=encode)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "made" / "here" / "teacher-abc"


def calls(spy: Mock) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [call.args for call in spy.call_args_list]


def open_cache(rows: list[list[int]], folder: Path, names: tuple[str, ...] = NAMES) -> TeacherCache:
    return TeacherCache(make_texts(rows), folder, names)


def fill(cache: TeacherCache, texts: object, encode: object = encode, **options) -> TeacherCache:
    cache.fill(np.asarray(texts), encode, PAD, **options)
    return cache


def dense(cache: TeacherCache, texts: object) -> np.ndarray:
    return cache.items(np.asarray(texts))["teacher_dense_vecs"]


def expected(rows: list[list[int]], texts: object) -> np.ndarray:
    return torch.stack([WEIGHTS[rows[i]].sum(0) for i in texts]).float().numpy()


def test_vectors_are_those_of_the_texts_that_were_asked_for(rows, folder):
    wanted = [7, 3, 149, 70]
    cache = fill(open_cache(rows, folder), wanted)
    np.testing.assert_allclose(dense(cache, wanted), expected(rows, wanted), rtol=1e-6)
    assert dense(cache, wanted).dtype == np.float32
    assert cache.missing(np.arange(150)).tolist() == sorted(set(range(150)) - set(wanted))
    with pytest.raises(KeyError, match="has no dense_vecs of some of the texts"):
        dense(cache, [3, 4])


def test_batches_are_of_similar_length_and_padded(rows, folder, spy, monkeypatch):
    monkeypatch.setattr(teacher_vectors, "BATCH_TEXTS", 64)
    fill(open_cache(rows, folder), np.arange(150), spy)
    sizes, lengths = [tuple(ids.shape) for ids, _ in calls(spy)], sorted(map(len, rows))
    assert sizes == [(64, lengths[149]), (64, lengths[85]), (22, lengths[21])]
    for ids, mask in calls(spy):
        assert ids.dtype == mask.dtype == torch.int64
        assert torch.equal(mask.bool(), ids != PAD)  # these texts hold no padding token


def test_a_batch_of_long_texts_has_few_of_them(folder, spy, monkeypatch):
    """64 texts of 8192 tokens would not fit into the memory of a device."""
    monkeypatch.setattr(teacher_vectors, "BATCH_TOKENS", 100)
    rows = [[5] * 40 for _ in range(4)] + [[5] * 300]
    fill(open_cache(rows, folder), np.arange(5), spy)
    assert [tuple(ids.shape) for ids, _ in calls(spy)] == [(1, 300), (2, 40), (2, 40)]


def test_the_teacher_sees_what_it_would_see_in_a_training_batch(spy, tmp_path):
    """A text may spell out the padding token; the two ways to get vectors must agree on it."""
    rows = [[0, 5, PAD, 6, 2], [0, 5, 2]]
    fill(open_cache(rows, tmp_path / "a"), [0, 1], spy)
    open_cache(rows, tmp_path / "b").fill(np.arange(2), spy, 42)
    dataset = EmbeddingDataset(make_texts(rows), np.array([[0], [1]]))
    batch = Collator(PAD)([dataset[0], dataset[1]])
    (ids, mask), (other, _) = calls(spy)
    assert torch.equal(ids, batch["input_ids"].squeeze(1))
    assert torch.equal(mask, batch["attention_mask"].squeeze(1))
    assert other.tolist() == [[0, 5, PAD, 6, 2], [0, 5, 2, 42, 42]]


def test_half_precision_vectors_become_float32(rows, folder):
    def half(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"dense_vecs": encode(ids, mask)["dense_vecs"].bfloat16()}

    vectors = dense(fill(open_cache(rows, folder), range(150), half), range(150))
    np.testing.assert_allclose(vectors, expected(rows, range(150)), rtol=2**-8)


def test_computed_once_then_read_and_added_to(rows, folder, spy):
    first = dense(fill(open_cache(rows, folder), range(40), spy), range(40))
    again = fill(open_cache(rows, folder), range(40), spy)
    assert len(calls(spy)) == 1
    assert np.array_equal(first, dense(again, range(40)))
    assert isinstance(again.outputs["dense_vecs"].values[0], np.memmap)
    fill(open_cache(rows, folder), range(20, 60), spy)
    assert len(calls(spy)[1][0]) == 20
    every = fill(open_cache(rows, folder), range(60), spy)
    assert len(calls(spy)) == 2
    np.testing.assert_allclose(dense(every, range(60)), expected(rows, range(60)), rtol=1e-6)
    assert {path.suffix for path in folder.iterdir()} == {".jsonl", ".texts", ".values"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_another_process_was_quicker_with_is_read(rows, folder, spy, monkeypatch):
    cache, lock_of = open_cache(rows, folder), teacher_vectors.lock_of

    @contextmanager
    def waited(path):
        monkeypatch.setattr(teacher_vectors, "lock_of", lock_of)
        fill(open_cache(rows, folder), range(150))
        yield

    monkeypatch.setattr(teacher_vectors, "lock_of", waited)
    fill(cache, range(150), spy)
    assert not cache.missing(np.arange(150)).size
    assert not calls(spy)


def test_what_was_done_before_a_failure_is_kept_and_the_rest_is_the_same(
    rows, folder, tmp_path, monkeypatch
):
    """A run that was killed while it embedded has, bit by bit, the numbers of another one."""
    monkeypatch.setattr(teacher_vectors, "BATCH_TEXTS", 16)
    monkeypatch.setattr(teacher_vectors, "PIECE_BYTES", 2 * 16 * 6 * 4)
    done = []

    def fails(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        done.append(len(ids))
        if len(done) == 6:
            raise RuntimeError("no memory")
        return encode(ids, mask)

    with pytest.raises(RuntimeError, match="no memory"):
        fill(open_cache(rows, folder), range(150), fails)
    lost = open_cache(rows, folder).missing(np.arange(150))
    assert len(lost) == 150 - 4 * 16  # a piece is two batches
    spy = Mock(side_effect=encode)
    whole = fill(open_cache(rows, tmp_path / "whole"), range(150), spy)
    sizes = [ids.shape for ids, _ in calls(spy)]
    spy.reset_mock()
    cache = fill(open_cache(rows, folder), range(150), spy)
    assert [ids.shape for ids, _ in calls(spy)] == sizes[4:]
    assert np.array_equal(dense(cache, range(150)), dense(whole, range(150)))


def test_a_piece_is_written_after_a_minute(rows, folder, monkeypatch):
    monkeypatch.setattr(teacher_vectors, "BATCH_TEXTS", 50)
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(teacher_vectors.time, "monotonic", lambda: next(clock))
    fill(open_cache(rows, folder), range(150))
    (pieces,) = folder.glob("*.jsonl")
    assert len(pieces.read_text().splitlines()) == 2


def test_a_full_disk_keeps_the_pieces_before(rows, folder, monkeypatch):
    monkeypatch.setattr(teacher_vectors, "BATCH_TEXTS", 50)
    monkeypatch.setattr(teacher_vectors, "PIECE_BYTES", 1)
    append, written = teacher_vectors._append, []

    def fills_up(path: Path, content: object) -> None:
        written.append(path)
        if len(written) == 5:  # half of the texts of the second piece
            append(path, bytes(content)[:8])
            raise OSError(28, "No space left on device")
        append(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(teacher_vectors, "_append", fills_up)
        with pytest.raises(OSError, match="No space left"):
            fill(open_cache(rows, folder), range(150))
    cache = open_cache(rows, folder)
    assert len(cache.missing(np.arange(150))) == 100
    vectors = dense(fill(cache, range(150)), range(150))
    np.testing.assert_allclose(vectors, expected(rows, range(150)), rtol=1e-6)


def test_it_tells_how_far_it_is(rows, folder, monkeypatch):
    monkeypatch.setattr(teacher_vectors, "BATCH_TEXTS", 64)
    told = []
    cache, lengths = open_cache(rows, folder), sorted(map(len, rows), reverse=True)
    assert cache.missing_tokens(np.arange(150)) == sum(lengths)
    fill(cache, range(150), report=told.append)
    assert told == [sum(lengths[start : start + 64]) for start in (0, 64, 128)]
    assert cache.missing_tokens(np.arange(150)) == 0


@pytest.mark.parametrize("names", [("dense_vecs",), TOKEN_NAMES])
def test_the_size_on_disk_is_known_before(names, rows, folder):
    fill(open_cache(rows, folder, names), range(150))
    found = sum(path.stat().st_size for path in folder.glob("*.values"))
    assert found == compute_cache_bytes(150, sum(map(len, rows)), names, 6, 6)


def test_key_is_stable_and_changes_with_teacher_tokens_boundaries_order_and_layout(monkeypatch):
    texts = make_texts([[4, 5], [6]])
    others = ([[4, 5], [7]], [[4], [5, 6]], [[6], [4, 5]], [[4, 5], [6], []])
    keys = {compute_cache_key(make_texts(other), "teacher") for other in others}
    keys |= {compute_cache_key(texts, teacher) for teacher in ("teacher", "teacher", "another")}
    monkeypatch.setattr(teacher_vectors, "FORMAT", teacher_vectors.FORMAT + 1)
    keys.add(compute_cache_key(texts, "teacher"))
    assert len(keys) == 7
    assert all(re.fullmatch("[0-9a-f]{24}", key) for key in keys)


def test_tokens_are_laid_out_as_the_ids(rows, folder):
    items = fill(open_cache(rows, folder, TOKEN_NAMES), range(150)).items(np.arange(150))
    for number, row in enumerate(rows):
        assert items["teacher_token_weights"][number].tolist() == row
        found = items["teacher_colbert_vecs"][number]
        assert found.dtype == np.float16
        assert not found[0].any()  # CLS has none
        np.testing.assert_allclose(found[1:], WEIGHTS[row[1:]].numpy(), atol=1e-3)


def test_what_is_missing_is_made_and_the_rest_is_kept(rows, spy, folder):
    fill(open_cache(rows, folder), range(100), spy)
    (before,) = folder.glob("dense_vecs*.values")
    content = before.read_bytes()
    cache = fill(open_cache(rows, folder, TOKEN_NAMES), range(50, 150), spy)
    assert [len(ids) for ids, _ in calls(spy)] == [100, 50, 50]
    assert before.read_bytes() == content
    sizes = {name: len(output.texts) for name, output in cache.outputs.items()}
    assert sizes == {"dense_vecs": 150, "token_weights": 100, "colbert_vecs": 100}
    assert not cache.missing(np.arange(50, 150)).size
    assert len(cache.missing(np.arange(50))) == 50


def test_tokens_from_disk_are_those_of_the_teacher_in_a_batch(rows, tmp_path):
    rows = [row for row in rows if len(row) > 1][:6]
    cache = fill(open_cache(rows, tmp_path / "t", TOKEN_NAMES), range(6))
    examples = np.array([[0, 1], [2, 3], [4, 5]])
    dataset = EmbeddingDataset(cache.texts, examples, teacher=cache)
    batch = Collator(PAD)([dataset[i] for i in range(3)])
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    live = encode(ids, mask)
    weights = live["token_weights"] * mask
    vectors = live["colbert_vecs"] * mask[:, 1:, None]
    found = batch["teacher_colbert_vecs"].flatten(0, 1).double()
    assert torch.equal(batch["teacher_token_weights"].flatten(0, 1).double(), weights)
    torch.testing.assert_close(found, vectors, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("suffix", "damage", "reason"),
    [
        (".values", lambda c: c[:-1], "damaged or not complete .mmap length"),
        (".values", lambda c: c[:99] + bytes([c[99] ^ 1]) + c[100:], "the checksum of line 1 is"),
        (".texts", lambda c: c[:-8], "the numbers of texts are too few"),
        (".texts", lambda c: bytes(len(c)), "the checksum of line 1 is not that of its content"),
        (".jsonl", lambda c: b"\0" * (len(c) - 1) + b"\n", ":1: is not JSON"),
        (".jsonl", lambda c: c.replace(b"width", b"wide"), ":1: has no width"),
    ],
)
def test_a_damaged_cache_says_so(suffix, damage, reason, rows, folder):
    fill(open_cache(rows, folder), range(150))
    (path,) = folder.glob(f"*{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{reason}.*To fix, delete .*/teacher-abc; it is made"):
        open_cache(rows, folder)


def test_checksums_of_a_large_cache_are_of_pieces_spread_over_it(rows, folder, monkeypatch):
    monkeypatch.setattr(teacher_vectors, "BATCH_TEXTS", 10)
    monkeypatch.setattr(teacher_vectors, "PIECE_BYTES", 1)
    monkeypatch.setattr(teacher_vectors, "BLOCK", 600)
    monkeypatch.setattr(teacher_vectors, "BLOCKS", 1)  # of 15 pieces of 240 bytes every sixth
    fill(open_cache(rows, folder), range(150))
    (path,) = folder.glob("*.values")
    content = path.read_bytes()
    for piece, noticed in ((0, True), (1, False), (5, False), (6, True), (12, True)):
        place = piece * 240
        path.write_bytes(content[:place] + b"xx" + content[place + 2 :])
        if noticed:
            with pytest.raises(ValueError, match=f"the checksum of line {piece + 1} is not"):
                open_cache(rows, folder)
        else:
            open_cache(rows, folder)
