"""Texts to outputs: the same as one text at a time."""

import numpy as np
import pytest
import torch

from bge_pruning.evaluation import text_encoder
from bge_pruning.evaluation.text_encoder import TextEncoder, batch_indices
from bge_pruning.models.embedding_heads import compute_lexical_weights
from bge_pruning.models.pretrained import load_base_model

TEXTS = [
    "the man plays the guitar",
    "a",
    "dog cat child in the park today",
    "the the the dog the",
    "a horse rides fast and the woman reads a red book",
]
BOTH = ("dense_vecs", "token_weights")


@pytest.fixture(scope="module")
def encoder(model_folder) -> TextEncoder:
    return TextEncoder(load_base_model(str(model_folder)), batch_size=2)


def one_by_one(encoder: TextEncoder, text: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.from_numpy(encoder.tokenize([text])[0].astype(np.int64))[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return ids, encoder.heads.outputs(encoder.backbone(ids, mask), mask)


def test_outputs_are_those_of_one_text_at_a_time_in_order(encoder):
    found = encoder.encode(TEXTS, BOTH)
    for row, text in enumerate(TEXTS):
        ids, outputs = one_by_one(encoder, text)
        np.testing.assert_allclose(found.dense_vecs[row], outputs["dense_vecs"][0], atol=1e-5)
        (expected,) = compute_lexical_weights(ids, outputs["token_weights"], encoder.special_ids)
        sparse = found.lexical_weights[row].tocoo()
        entries = dict(zip(sparse.col.tolist(), sparse.data.tolist(), strict=True))
        assert entries == pytest.approx(expected, abs=1e-5)
    assert found.lexical_weights.shape == (len(TEXTS), 99)
    assert found.lexical_weights.nnz > 5


def test_only_what_is_asked_for(encoder):
    assert encoder.encode(TEXTS).lexical_weights is None
    assert encoder.encode(TEXTS, ("token_weights",)).dense_vecs is None


def test_no_texts(encoder):
    found = encoder.encode([], ("token_weights",))
    assert found.lexical_weights.shape == (0, 99)


@pytest.mark.parametrize("chunk", [1, 3])
def test_tokens_do_not_depend_on_the_chunks(chunk, encoder, monkeypatch):
    whole = encoder.tokenize(TEXTS)
    monkeypatch.setattr(text_encoder, "CHUNK", chunk)
    parts = encoder.tokenize(TEXTS)
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.starts.tolist() == whole.starts.tolist()


def test_texts_are_cut_at_the_limit(model_folder):
    short = TextEncoder(load_base_model(str(model_folder)), max_length=4)
    tokens = short.tokenize(TEXTS)
    assert tokens.lengths.max() == 4
    assert tokens.truncated == 4


def test_batches_are_sorted_and_bounded():
    lengths = np.array([5, 100, 7, 30, 31, 200, 6])
    batches = [batch.tolist() for batch in batch_indices(lengths, 3, 100)]
    assert batches == [[5], [1], [4, 3, 2], [6, 0]]
    assert list(batch_indices(np.zeros(0, int), 3, 100)) == []
