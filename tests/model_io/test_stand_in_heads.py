"""The heads that an encoder without them gets, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import Ridge
from transformers import AutoModel

from bge_pruning.model_io.stand_in_heads import (
    compute_identity_head,
    compute_scaled_idf,
    fit_sparse_head,
)

BOS, PAD, EOS, UNK = range(4)
SPECIAL = [BOS, PAD, EOS, UNK]
VOCAB, COMMON = 99, 4  # COMMON is the one word that every text holds


@pytest.fixture(scope="module")
def encoder(model_folder):
    # In float64, so that batching and padding make no difference that the fit would amplify.
    return AutoModel.from_pretrained(model_folder).double().eval()


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Sixty texts of 1 to 9 words between the marks, some with an unknown one."""
    generator = np.random.default_rng(0)
    words = [generator.integers(5, VOCAB, generator.integers(1, 9)).tolist() for _ in range(60)]
    words[7][0] = UNK
    return [[BOS, COMMON, *text, EOS] for text in words]


def pad(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """One batch, filled up to the longest text."""
    length = max(map(len, texts))
    ids = torch.tensor([text + [PAD] * (length - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}


@pytest.fixture(scope="module")
def data(encoder, texts) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of the words, computed one text at a time, and what the head shall give."""
    idf = reference_idf(texts)
    inputs, targets = [], []
    for text in texts:
        with torch.no_grad():
            hidden = encoder(input_ids=torch.tensor([text])).last_hidden_state[0].numpy()
        words = [place for place, token in enumerate(text) if token not in SPECIAL]
        inputs.append(hidden[words])
        targets.append(idf[[text[place] for place in words]])
    return np.concatenate(inputs), np.concatenate(targets)


def reference_idf(texts) -> np.ndarray:
    counts = np.zeros((len(texts), VOCAB))
    for row, text in enumerate(texts):
        np.add.at(counts[row], list(text), 1)
    idf = TfidfTransformer(smooth_idf=True).fit(counts).idf_ - 1  # scikit-learn adds 1
    return np.where(counts.any(0), idf / np.log((1 + len(texts)) / 2), 0)


def test_identity_head_returns_its_input():
    head = torch.nn.Linear(5, 5)
    head.load_state_dict(compute_identity_head(5))
    states = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(states), states)


def test_idf_is_that_of_scikit_learn(texts):
    """It counts a text once, and tokens that do not occur as nothing."""
    idf = compute_scaled_idf(texts, VOCAB)
    assert (idf.shape, idf.dtype) == ((VOCAB,), torch.float64)
    np.testing.assert_allclose(idf.numpy(), reference_idf(texts), rtol=0, atol=1e-14)
    assert idf[COMMON] == 0  # in every text
    assert idf.min() >= 0 and idf.max() == 1
    assert compute_scaled_idf([[0, 0, 0], {0, 1}], 4).tolist() == [0, 1, 0, 0]
    assert compute_scaled_idf([(), ()], 2).tolist() == [0, 0]
    for count in (0, 1):
        message = rf"sentences: {count} distinct texts, expected at least 2.*To fix, pass real sent"
        with pytest.raises(ValueError, match=message):
            compute_scaled_idf([[1, 2]] * count, 5)


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("size", [60, 7])
def test_sparse_head_is_scikit_learns_ridge(size, ridge, encoder, texts, data):
    batches = [pad(texts[start : start + size]) for start in range(0, len(texts), size)]
    options = {} if ridge == 1e-3 else {"ridge": ridge}  # the default is a thousandth
    head = fit_sparse_head(encoder, batches, SPECIAL, **options)
    inputs, targets = data
    alpha = ridge * len(inputs) * inputs.var(axis=0).mean()
    expected = Ridge(alpha, solver="svd").fit(inputs, targets)
    np.testing.assert_allclose(head["weight"][0], expected.coef_, rtol=0, atol=1e-6)
    np.testing.assert_allclose(head["bias"][0], expected.intercept_, rtol=0, atol=1e-6)


def test_sparse_head_fits_a_linear_layer_and_weighs_rare_words_more(encoder, texts):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    head = fit_sparse_head(encoder, [pad(texts)], SPECIAL)
    torch.nn.Linear(32, 1).load_state_dict(head, strict=True)
    assert {(v.dtype, v.requires_grad) for v in head.values()} == {(torch.float32, False)}
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    batch = pad(texts)
    with torch.no_grad():
        hidden = encoder(**batch).last_hidden_state
    weights = torch.nn.functional.linear(hidden.float(), head["weight"], head["bias"]).squeeze(-1)
    ids = batch["input_ids"]
    rare = (ids > COMMON) & batch["attention_mask"].bool()
    assert weights[rare].mean() > weights[ids == COMMON].mean() + 0.2
    named, masked = (
        fit_sparse_head(encoder, [pad(texts)], special) for special in (SPECIAL, [BOS, EOS, UNK])
    )
    assert torch.equal(named["weight"], masked["weight"])


def test_extremes_of_ridge_and_of_texts(encoder, texts, data):
    """Fewer words than dimensions are enough; a large ridge leaves the mean only."""
    head = fit_sparse_head(encoder, [pad([[BOS, 5, EOS], [BOS, 6, EOS]])], SPECIAL)
    assert all(value.isfinite().all() for value in head.values())
    head = fit_sparse_head(encoder, [pad(texts)], SPECIAL, ridge=1e9)
    assert head["weight"].abs().max() < 1e-6
    assert head["bias"].item() == pytest.approx(data[1].mean(), abs=1e-6)


def test_too_few_texts_and_other_ridges_are_refused(encoder, texts):
    for ridge in (0, -1.0, float("nan"), float("inf")):
        message = rf"ridge is {ridge}, expected a number above 0\. To fix, use the default of 1e-3"
        with pytest.raises(ValueError, match=message):
            fit_sparse_head(encoder, [pad(texts)], SPECIAL, ridge=ridge)
    message = r"sentences: only special and unknown tokens, expected words.*To fix, pass sentences"
    with pytest.raises(ValueError, match=message):
        fit_sparse_head(encoder, [pad([[BOS, UNK, EOS], [BOS, EOS]])], SPECIAL)
    for batches in ([], [pad([[BOS, 5, EOS]])]):
        with pytest.raises(ValueError, match="distinct texts, expected at least 2"):
            fit_sparse_head(encoder, batches, SPECIAL)
