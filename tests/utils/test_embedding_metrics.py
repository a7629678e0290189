import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from bge_pruning.utils.embedding_metrics import (
    compute_alignment,
    compute_cosine_pearson,
    compute_cosine_spearman,
    compute_uniformity,
)

METRICS = [compute_cosine_spearman, compute_cosine_pearson]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(20, 8)), rng.normal(size=(20, 8)), rng.uniform(0, 5, 20)


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [(compute_cosine_spearman, spearmanr), (compute_cosine_pearson, pearsonr)],
)
def test_equals_scipy_on_cosines(metric, oracle, data):
    a, b, gold = data
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert metric(a, b, gold) == pytest.approx(oracle(cosines, gold).statistic, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_length_of_vectors_does_not_matter(metric, data):
    a, b, gold = data
    scale = np.linspace(0.1, 9, 20)[:, None]
    assert metric(a * scale, b.astype(np.float32), list(gold)) == pytest.approx(
        metric(a, b, gold), abs=1e-6
    )


def test_perfect_order_is_one():
    angles = np.linspace(0, 3, 9)
    b = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    a = np.tile([1.0, 0.0], (9, 1))
    assert compute_cosine_spearman(a, b, -angles) == pytest.approx(1)
    assert compute_cosine_spearman(a, b, angles) == pytest.approx(-1)


@pytest.mark.parametrize("metric", METRICS)
def test_shapes_that_disagree(metric, data):
    a, b, gold = data
    with pytest.raises(ValueError, match=r"a \(20, 8\), b \(19, 8\) and gold \(20,\) are not"):
        metric(a, b[:-1], gold)
    with pytest.raises(ValueError, match=r"gold \(19,\) are not"):
        metric(a, b, gold[:-1])
    with pytest.raises(ValueError, match="1 pairs have no correlation"):
        metric(a[:1], b[:1], gold[:1])


@pytest.mark.parametrize("metric", METRICS)
def test_undefined_correlation(metric, data):
    a, b, gold = data
    with pytest.raises(ValueError, match="every gold score is 3, so the correlation is undefined"):
        metric(a, b, np.full(20, 3.0))
    with pytest.raises(ValueError, match=r"every cosine similarity is 1, so .* tokenizer"):
        metric(np.ones((20, 4)), np.ones((20, 4)), gold)
    a[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 20 values of the cosine similarity are not finite"):
        metric(a, b, gold)


# Alignment and uniformity


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tuple(torch.nn.functional.normalize(pair, dim=-1))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment_is_the_mean_distance_of_pairs(alpha, vectors):
    a, b = vectors
    expected = sum(float((x - y).norm()) ** alpha for x, y in zip(a, b, strict=True)) / 6
    assert compute_alignment(a, b, alpha) == pytest.approx(expected, abs=1e-12)
    assert compute_alignment(a, a, alpha) == 0.0
    assert compute_alignment(a, -a, alpha) == pytest.approx(2.0**alpha)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_uniformity_is_over_all_pairs_of_different_rows(t, vectors):
    a, _ = vectors
    kernel = [
        math.exp(-t * float((a[i] - a[j]).norm()) ** 2)
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert compute_uniformity(a, t) == pytest.approx(math.log(sum(kernel) / 30), abs=1e-12)
    assert compute_uniformity(torch.stack([a[0], a[0]]), t) == 0.0
    assert compute_uniformity(torch.stack([a[0], -a[0]]), t) == pytest.approx(-4 * t)


def test_spread_vectors_are_more_uniform_than_crowded_ones(vectors):
    crowded = torch.nn.functional.normalize(vectors[0] + 3.0, dim=-1)
    assert compute_uniformity(vectors[0]) < compute_uniformity(crowded)


def test_vectors_that_make_no_pairs():
    message = r"vectors \(2, 3\) and \(3, 3\) are not \(B, H\) twice\. To fix, give two vectors"
    with pytest.raises(ValueError, match=message):
        compute_alignment(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"vectors \(0, 3\) and \(0, 3\) are not"):
        compute_alignment(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"vectors \(1, 3\) have no pairs\. To fix, give two rows"):
        compute_uniformity(torch.zeros(1, 3))
