"""Scores of every query with every passage, beside plain loops and FlagEmbedding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bge_pruning.models.embedding_heads import Outputs, compute_scores, compute_sparse_scores

CLS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = (CLS, PAD, EOS, UNK)
VOCABULARY = 14


def make_texts(texts: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids with repeated tokens and a few unknown ones, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (texts, length), generator=generator)
    ids[:, 0] = CLS
    for row in range(texts):
        last = 2 + (row * 5 + seed) % (length - 2)
        ids[row, last] = EOS
        ids[row, last + 1 :] = PAD
    return ids, ids.ne(PAD).long()


def make_outputs(texts: int, length: int, seed: int, hidden: int = 8) -> Outputs:
    ids, mask = make_texts(texts, length, seed)
    generator = torch.Generator().manual_seed(seed + 100)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    normalize = torch.nn.functional.normalize
    return Outputs(
        ids,
        mask,
        dense_vecs=normalize(noise(texts, hidden), dim=-1),
        token_weights=noise(texts, length).relu() * mask,
        colbert_vecs=normalize(noise(texts, length - 1, hidden), dim=-1) * mask[:, 1:, None],
    )


QUERIES, PASSAGES = make_outputs(4, 12, 1), make_outputs(7, 16, 2)


def loop_sparse(queries: Outputs, passages: Outputs) -> Tensor:
    """FlagEmbedding's definition, one dict per text."""

    def vector(ids: Tensor, weights: Tensor) -> dict[int, float]:
        found: dict[int, float] = {}
        for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if token not in SPECIAL and weight > 0:
                found[token] = max(weight, found.get(token, 0.0))
        return found

    q = [vector(i, w) for i, w in zip(queries.input_ids, queries.token_weights, strict=True)]
    p = [vector(i, w) for i, w in zip(passages.input_ids, passages.token_weights, strict=True)]
    return torch.tensor(
        [[sum(w * b.get(t, 0.0) for t, w in a.items()) for b in p] for a in q], dtype=torch.float64
    )


def words(ids: list[list[int]], weights: list[list[float]]) -> Outputs:
    ids = torch.tensor(ids)
    return Outputs(ids, torch.ones_like(ids), torch.zeros(len(ids), 1), torch.tensor(weights))


def test_sparse_is_the_plain_loop_with_true_gradients():
    expected = loop_sparse(QUERIES, PASSAGES)
    assert (expected > 0).sum() > 5
    found = compute_sparse_scores(QUERIES, PASSAGES, SPECIAL)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = (QUERIES.token_weights + 0.01 * torch.arange(12)).requires_grad_()

    def scores(weights: Tensor) -> Tensor:
        return compute_sparse_scores(replace(QUERIES, token_weights=weights), PASSAGES, SPECIAL)

    assert torch.autograd.gradcheck(scores, (weights,))


def test_sparse_of_texts_without_words_is_zero_and_needs_no_vocabulary():
    """Ids as large as BGE-M3's cost what a handful of tokens costs."""
    texts = words([[CLS, EOS, PAD], [CLS, UNK, EOS]], [[1.0] * 3] * 2)
    assert not compute_sparse_scores(texts, texts, SPECIAL).any()
    ids = [[CLS, 250_001, 7, EOS], [CLS, 249_999, 7, EOS]]
    texts = words(ids, [[0.0, 2.0, 0.5, 0.0], [0.0, 3.0, 4.0, 0.0]])
    expected = torch.tensor([[4.25, 2.0], [2.0, 25.0]])
    assert torch.equal(compute_sparse_scores(texts, texts, SPECIAL), expected)


def test_all_outputs_are_those_of_flagembedding():
    """Its training code, at temperature 1; its sparse vectors span the vocabulary."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3.modeling import EncoderOnlyEmbedderM3Model

    theirs = EncoderOnlyEmbedderM3Model.__new__(EncoderOnlyEmbedderM3Model)
    torch.nn.Module.__init__(theirs)
    theirs.temperature = 1.0
    scores, together = compute_scores(QUERIES, PASSAGES, SPECIAL)

    def spread(outputs: Outputs) -> Tensor:
        vectors = torch.zeros(len(outputs.input_ids), VOCABULARY, dtype=torch.float64)
        vectors.scatter_reduce_(1, outputs.input_ids, outputs.token_weights, "amax")
        vectors[:, list(SPECIAL)] = 0.0
        return vectors

    # It takes padding for vectors of zeros, so only texts without any are comparable.
    whole = make_outputs(5, 9, 3)
    vectors = torch.nn.functional.normalize(torch.randn(5, 8, 8, dtype=torch.float64), dim=-1)
    whole = replace(
        whole, attention_mask=torch.ones_like(whole.attention_mask), colbert_vecs=vectors
    )
    expected = {
        "dense": theirs.compute_dense_score(QUERIES.dense_vecs, PASSAGES.dense_vecs),
        "sparse": theirs.compute_sparse_score(spread(QUERIES), spread(PASSAGES)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, atol=1e-12, rtol=0)
    found = compute_scores(QUERIES, whole, SPECIAL).outputs["colbert"]
    mask = QUERIES.attention_mask
    colbert = theirs.compute_colbert_score(QUERIES.colbert_vecs, whole.colbert_vecs, mask)
    torch.testing.assert_close(found, colbert, atol=1e-12, rtol=0)
    parts = [scores[name] for name in ("dense", "sparse", "colbert")]
    ensemble = theirs.ensemble_score(None, None, *parts)
    torch.testing.assert_close(together, ensemble, atol=1e-12, rtol=0)


@pytest.mark.parametrize("missing", ["token_weights", "colbert_vecs"])
def test_outputs_that_one_side_lacks_are_left_out(missing):
    scores = compute_scores(QUERIES, replace(PASSAGES, **{missing: None}), SPECIAL)
    kept = {"token_weights": "colbert", "colbert_vecs": "sparse"}[missing]
    assert set(scores.all()) == {"dense", kept, "ensemble"}
    alone = replace(PASSAGES, token_weights=None, colbert_vecs=None)
    assert set(compute_scores(QUERIES, alone, SPECIAL).all()) == {"dense"}
