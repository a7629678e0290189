"""Errors of cosines, and intervals of their differences."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from bge_pruning.evaluation.statistics import cosine_error, error_difference

TEXTS = 40


def cosines(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def noisy(vectors: np.ndarray, noise: float, seed: int) -> np.ndarray:
    return cosines(vectors + noise * np.random.default_rng(seed).normal(size=vectors.shape))


VECTORS = np.random.default_rng(1).normal(size=(TEXTS, 16))
WHOLE = cosines(VECTORS)


def test_an_error_is_one_minus_pearsons_correlation_over_pairs():
    found = noisy(VECTORS, 0.5, 2)
    pairs = [(i, j) for i in range(TEXTS) for j in range(i)]
    a, b = ([m[p] for p in pairs] for m in (found, WHOLE))
    assert cosine_error(found, WHOLE) == pytest.approx(1 - pearsonr(a, b).statistic)


def test_it_is_of_their_order_not_of_their_size():
    assert cosine_error(0.5 * WHOLE + 0.3, WHOLE) == pytest.approx(0.0)
    assert cosine_error(-WHOLE, WHOLE) == pytest.approx(2.0)


def test_a_side_that_tells_nothing_apart_is_all_wrong():
    flat = np.full((TEXTS, TEXTS), 0.7)
    assert cosine_error(flat, WHOLE) == cosine_error(WHOLE, flat) == 1.0


def test_a_model_is_surely_worse_than_a_better_one_and_not_than_one_as_good():
    good, other, bad = noisy(VECTORS, 0.2, 3), noisy(VECTORS, 0.2, 4), noisy(VECTORS, 0.6, 5)
    low, high = error_difference(bad, good, WHOLE)
    assert 0 < low < cosine_error(bad, WHOLE) - cosine_error(good, WHOLE) < high
    low, high = error_difference(other, good, WHOLE)
    assert low < 0 < high
    assert error_difference(good, good, WHOLE) == (0.0, 0.0)


def test_the_other_way_round_the_interval_is_turned():
    a, b = noisy(VECTORS, 0.2, 3), noisy(VECTORS, 0.4, 4)
    low, high = error_difference(a, b, WHOLE, seed=9)
    assert error_difference(b, a, WHOLE, seed=9) == pytest.approx((-high, -low))


def test_intervals_hold_what_new_texts_show():
    """Of draws of texts from many, about 95 % have an interval with the difference of all."""
    generator = np.random.default_rng(6)
    vectors = generator.normal(size=(800, 16))
    whole, a, b = cosines(vectors), noisy(vectors, 0.3, 7), noisy(vectors, 0.35, 8)
    true = cosine_error(a, whole) - cosine_error(b, whole)
    held = 0
    for seed in range(60):
        texts = generator.choice(800, TEXTS, replace=False)
        part = np.ix_(texts, texts)
        low, high = error_difference(a[part], b[part], whole[part], seed)
        held += low <= true <= high
    assert held >= 51  # 85 %: a percentile interval of 40 texts is a little short
