"""Intervals and tests, beside SciPy's."""

import numpy as np
import pytest
from scipy.stats import bootstrap, pearsonr, permutation_test, rankdata, spearmanr

from bge_pruning.evaluation import statistics
from bge_pruning.evaluation.statistics import (
    bootstrap_correlation_interval,
    bootstrap_interval,
    cosine_error,
    error_difference,
    paired_correlation_p_value,
    paired_p_value,
)

VALUES = np.random.default_rng(0).beta(2, 1, 120)


def test_the_interval_is_scipys():
    expected = bootstrap(
        (VALUES,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_interval(VALUES) == pytest.approx(tuple(expected), abs=0.006)
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES)


def test_equal_values_have_no_width_and_a_lower_level_is_narrower():
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    wide, narrow = bootstrap_interval(VALUES), bootstrap_interval(VALUES, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.06])
def test_the_p_value_is_scipys(shift):
    other = VALUES - shift + np.random.default_rng(2).normal(0, 0.15, len(VALUES))
    options = {"permutation_type": "samples", "n_resamples": 4000, "rng": np.random.default_rng(3)}
    expected = permutation_test((VALUES, other), lambda a, b: np.mean(a - b), **options).pvalue
    assert paired_p_value(VALUES, other) == pytest.approx(expected, abs=0.03)


def test_the_same_scores_are_no_difference():
    assert paired_p_value(VALUES, VALUES) == 1.0
    assert paired_correlation_p_value(GOOD, 7 * GOOD - 3, GOLD) == 1.0  # of any scale


def test_nothing_to_average():
    measures = {bootstrap_interval: 1, paired_p_value: 2}
    measures |= {bootstrap_correlation_interval: 2, paired_correlation_p_value: 3}
    for measure, arguments in measures.items():
        with pytest.raises(ValueError, match="no scores to compare. To fix, evaluate on at least"):
            measure(*[np.zeros(0)] * arguments)


GENERATOR = np.random.default_rng(4)
GOLD = GENERATOR.integers(0, 6, 90).astype(float)
GOOD = GOLD + GENERATOR.normal(0, 1, 90)
WORSE = GOLD + GENERATOR.normal(0, 3, 90)


def correlations(a, b, axis=-1):
    """Spearman's along an axis; scipy's own has none."""
    return pearsonr(rankdata(a, axis=axis), rankdata(b, axis=axis), axis=axis).statistic


def test_the_interval_of_a_correlation_is_scipys():
    options = {"method": "percentile", "n_resamples": 2000, "rng": np.random.default_rng(1)}
    found = bootstrap((GOOD, GOLD), correlations, paired=True, **options)
    expected = found.confidence_interval
    assert bootstrap_correlation_interval(GOOD, GOLD) == pytest.approx(tuple(expected), abs=0.012)

    # Half of the samples of two pairs hold one pair twice: they show no correlation.
    assert bootstrap_correlation_interval(np.array([0.1, 0.2]), np.array([1.0, 2.0])) == (0.0, 1.0)


def test_one_pair_alone_is_no_sure_correlation():
    """A third of the samples lack the only pair that a sparse model gives a similarity."""
    similarity = np.zeros(90)
    similarity[GOLD.argmax()] = 1.0
    low, high = bootstrap_correlation_interval(similarity, GOLD)
    assert low == 0 < spearmanr(similarity, GOLD).statistic < high
    assert paired_correlation_p_value(similarity, np.zeros(90), GOLD) > 0.05


@pytest.mark.parametrize("other", [GOOD + GENERATOR.normal(0, 1, 90), WORSE, GOOD**3])
def test_the_p_value_of_two_correlations_is_scipys(other):
    def difference(a, b, axis=-1):
        gold = np.broadcast_to(GOLD, a.shape)
        return correlations(a, gold, axis) - correlations(b, gold, axis)

    options = {"permutation_type": "samples", "n_resamples": 1500, "rng": np.random.default_rng(3)}
    expected = permutation_test((rankdata(GOOD), rankdata(other)), difference, **options).pvalue
    assert paired_correlation_p_value(GOOD, other, GOLD) == pytest.approx(expected, abs=0.04)


def test_blocks_change_nothing_but_memory(monkeypatch):
    assert len(list(statistics._blocks(10**9))) == statistics.SAMPLES
    assert sum(statistics._blocks(90)) == statistics.SAMPLES
    monkeypatch.setattr(statistics, "BLOCK", 900)
    assert sum(statistics._blocks(90)) == statistics.SAMPLES
    narrow = bootstrap_correlation_interval(GOOD, GOLD)
    monkeypatch.undo()
    assert bootstrap_correlation_interval(GOOD, GOLD) == pytest.approx(narrow, abs=0.012)


# Errors of cosines, and intervals of their differences

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
    # It is of their order, not of their size.
    assert cosine_error(0.5 * WHOLE + 0.3, WHOLE) == pytest.approx(0.0)
    assert cosine_error(-WHOLE, WHOLE) == pytest.approx(2.0)
    # A side that tells nothing apart is all wrong.
    flat = np.full((TEXTS, TEXTS), 0.7)
    assert cosine_error(flat, WHOLE) == cosine_error(WHOLE, flat) == 1.0


def test_a_model_is_surely_worse_than_a_better_one_and_not_than_one_as_good():
    good, other, bad = noisy(VECTORS, 0.2, 3), noisy(VECTORS, 0.2, 4), noisy(VECTORS, 0.6, 5)
    low, high = error_difference(bad, good, WHOLE)
    assert 0 < low < cosine_error(bad, WHOLE) - cosine_error(good, WHOLE) < high
    low, high = error_difference(other, good, WHOLE)
    assert low < 0 < high
    assert error_difference(good, good, WHOLE) == (0.0, 0.0)
    assert error_difference(good, other, WHOLE) == pytest.approx((-high, -low))


def test_intervals_hold_what_new_texts_show(monkeypatch):
    """Of draws of texts from many, about 95 % have an interval with the difference of all."""
    monkeypatch.setattr(statistics, "SAMPLED_TEXTS", 200)
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
