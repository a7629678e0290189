"""Tokenised texts, examples over them, and padded batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from bge_pruning.datasets.embedding_dataset import (
    Collator,
    EmbeddingDataset,
    TokenizedTexts,
    build_tokenizer,
    perturb_texts,
    replace_tokens,
    tokenize,
)
from bge_pruning.datasets.teacher_vectors import TeacherCache

TEXTS = ["the man plays the guitar", "a", "Никто не знает 🐈", "", "dog cat child in the park"]


def as_lists(texts: TokenizedTexts) -> list[list[int]]:
    return [texts[i].tolist() for i in range(len(texts))]


def from_lists(*rows: list[int]) -> TokenizedTexts:
    starts = np.cumsum([0, *map(len, rows)])
    return TokenizedTexts(np.array([i for row in rows for i in row], np.int32), starts, 0)


@pytest.mark.parametrize("max_length", [128, 6, 3])
def test_token_ids_are_those_of_transformers(max_length, tokenizer_json, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    texts = tokenize(TEXTS, build_tokenizer(tokenizer_json, max_length))
    expected = tokenizer(TEXTS, truncation=True, max_length=max_length)["input_ids"]
    assert as_lists(texts) == expected
    assert len(texts) == len(TEXTS)
    assert texts.lengths.tolist() == [len(row) for row in expected]
    whole = tokenizer(TEXTS)["input_ids"]
    assert texts.truncated == sum(len(row) > max_length for row in whole)
    assert texts.ids.dtype == np.int32


def test_padding_and_truncation_of_the_tokenizer_file_are_not_used(tokenizer_json):
    other = Tokenizer.from_str(tokenizer_json.decode())
    other.enable_padding(length=20, pad_id=1, pad_token="<pad>")
    other.enable_truncation(3)
    texts = tokenize(TEXTS, build_tokenizer(other.to_str().encode(), 128))
    assert as_lists(texts) == as_lists(tokenize(TEXTS, build_tokenizer(tokenizer_json, 128)))
    assert texts.truncated == 0


def test_no_texts(tokenizer_json):
    texts = tokenize([], build_tokenizer(tokenizer_json, 128))
    assert (len(texts), texts.lengths.tolist(), texts.truncated) == (0, [], 0)
    dataset = EmbeddingDataset(texts, np.empty((0, 2), int))
    assert (len(dataset), dataset.lengths.tolist()) == (0, [])


def test_a_limit_without_room_for_the_special_tokens_is_refused(tokenizer_json):
    with pytest.raises(ValueError, match=r"max_length 1 .*2 special tokens.*To fix"):
        tokenize(["a man plays"], build_tokenizer(tokenizer_json, 1))


def test_replaced_tokens_leave_lengths_and_special_tokens():
    generator = np.random.default_rng(3)
    rows = [[0, *generator.integers(4, 50, 60).tolist(), 2] for _ in range(200)]
    texts = from_lists(*rows)
    candidates = np.arange(4, 90)
    found = replace_tokens(texts, 0.8, candidates, seed=1)
    assert np.array_equal(found.starts, texts.starts) and found.ids.dtype == np.int32
    assert all(row[0] == 0 and row[-1] == 2 for row in as_lists(found))
    assert set(np.unique(found.ids)) == {0, 2, *candidates.tolist()}
    shares = [np.mean(found[i] != texts[i]) for i in range(200)]
    # Drawn from 0 to 0.8, less the two special tokens and the few that are drawn as they were.
    assert min(shares) < 0.05 and 0.7 < max(shares) < 0.95
    assert np.mean(shares) == pytest.approx(0.4 * 60 / 62 * 85 / 86, abs=0.04)


def test_perturbed_texts_lose_a_span_or_swap_two():
    generator = np.random.default_rng(3)
    rows = [[0, 4, *range(5, 5 + n), 2] for n in (0, 1, 2, 3, 9)]
    rows.append([0, 4, *generator.integers(5, 9, 30).tolist(), 2])
    texts = from_lists(*rows)
    numbers = np.repeat(np.arange(6), 200)
    longer, added = perturb_texts(texts, numbers, 2, np.random.default_rng(1))
    assert (added.reshape(6, 200)[:2] == -1).all() and longer.ids.dtype == np.int32
    assert added[400:].tolist() == [*range(6, 806)] and len(longer) == 806
    assert as_lists(longer)[:6] == rows
    ways = set()
    for number, copy in zip(numbers[400:], as_lists(longer)[6:], strict=True):
        row, inner = rows[number], copy[2:-1]
        assert copy != row and copy[:2] == row[:2] and copy[-1] == 2 and inner
        body, lost = row[2:-1], len(row) - len(copy)
        cuts = range(len(body) + 1)
        if lost:
            assert lost <= len(body) / 2
            assert any(body[:a] + body[a + lost :] == inner for a in cuts)
        else:
            swaps = (
                body[:a] + body[b:c] + body[a:b] + body[c:]
                for a in cuts
                for b in cuts[a:]
                for c in cuts[b:]
            )
            assert inner in swaps
        ways.add((number, bool(lost)))
    assert len(ways) == 8  # both, of each text of two tokens or more


def test_replaced_tokens_follow_the_seed():
    texts = from_lists(*[[0, 7, 8, 9, 10, 11, 2]] * 20)
    found = [replace_tokens(texts, 1.0, np.arange(4, 90), seed).ids for seed in (1, 1, 2)]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    assert np.array_equal(replace_tokens(texts, 0.0, np.arange(4, 90), 1).ids, texts.ids)


@pytest.fixture
def texts() -> TokenizedTexts:
    return from_lists([0, 7, 8, 9, 2], [0, 2], [0, 5, 2], [0, 6, 6, 2])


def cached(texts: TokenizedTexts, folder: Path, vectors: np.ndarray) -> TeacherCache:
    cache = TeacherCache(texts, folder, ["dense_vecs"])
    cache.add(np.arange(len(vectors)), {"dense_vecs": vectors})
    return cache


def test_items(texts, tmp_path):
    examples = np.array([[0, 1], [3, 2]])
    vectors = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    scores = np.array([0.25, 1.0], np.float32)
    dataset = EmbeddingDataset(texts, examples, scores, cached(texts, tmp_path, vectors))
    assert len(dataset) == 2
    assert dataset.lengths.tolist() == [5, 4]
    item = dataset[1]
    assert [ids.tolist() for ids in item["ids"]] == [[0, 6, 6, 2], [0, 5, 2]]
    assert item["score"] == 1.0
    assert item["teacher_dense_vecs"].tolist() == [[6.0, 7.0], [4.0, 5.0]]

    assert EmbeddingDataset(texts, np.array([[2]]))[0].keys() == {"ids"}  # only what is known


def test_batch_is_padded_to_its_longest_text(texts):
    dataset = EmbeddingDataset(texts, np.array([[0, 1], [3, 2]]), np.array([0.25, 1.0]))
    batch = Collator(pad_token_id=1)([dataset[0], dataset[1]])
    ids = [[[0, 7, 8, 9, 2], [0, 2, 1, 1, 1]], [[0, 6, 6, 2, 1], [0, 5, 2, 1, 1]]]
    mask = [[[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]]
    assert batch.keys() == {"input_ids", "attention_mask", "lengths", "scores"}
    assert batch["lengths"] == [[5, 2], [4, 3]]
    assert torch.equal(batch["input_ids"], torch.tensor(ids))
    assert torch.equal(batch["attention_mask"], torch.tensor(mask))
    assert torch.equal(batch["scores"], torch.tensor([0.25, 1.0]))
    assert batch["scores"].dtype == torch.float32


def test_batch_of_another_padding(texts):
    batch = Collator(pad_token_id=42)([EmbeddingDataset(texts, np.array([[1, 2]]))[0]])
    assert batch["input_ids"].tolist() == [[[0, 2, 42], [0, 5, 2]]]
    assert batch.keys() == {"input_ids", "attention_mask", "lengths"}

    # A padding token inside a text is text, as transformers has it.
    dataset = EmbeddingDataset(from_lists([0, 1, 2], [0, 2]), np.array([[0, 1]]))
    assert Collator(1)([dataset[0]])["attention_mask"].tolist() == [[[1, 1, 1], [1, 1, 0]]]


def test_batch_equals_transformers_padding(tokenizer_json, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = tokenize(TEXTS, build_tokenizer(tokenizer_json, 128))
    dataset = EmbeddingDataset(tokens, np.arange(5)[:, None])
    (batch,) = DataLoader(dataset, batch_size=5, collate_fn=Collator(tokenizer.pad_token_id))
    expected = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name].squeeze(1), expected[name])


def test_teacher_vectors_on_disk_become_a_batch(texts, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    teacher = cached(texts, tmp_path, vectors)
    dataset = EmbeddingDataset(texts, np.array([[3, 0], [1, 2]]), None, teacher)
    batch = Collator(1)([dataset[0], dataset[1]])
    expected = torch.from_numpy(vectors[[[3, 0], [1, 2]]])
    assert torch.equal(batch["teacher_dense_vecs"], expected)
    batch["teacher_dense_vecs"].zero_()  # the batch is a copy, the file is safe
    assert np.array_equal(dataset[0]["teacher_dense_vecs"], vectors[[3, 0]])
