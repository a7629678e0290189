"""Intervals and tests, beside SciPy's."""

import numpy as np
import pytest
from scipy.stats import bootstrap, permutation_test

from bge_pruning.evaluation.statistics import bootstrap_interval, paired_p_value

VALUES = np.random.default_rng(0).beta(2, 1, 120)


def test_the_interval_is_scipys():
    expected = bootstrap(
        (VALUES,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_interval(VALUES) == pytest.approx(tuple(expected), abs=0.006)
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES)


def test_equal_values_have_no_width():
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)


def test_a_lower_level_is_narrower():
    wide, narrow = bootstrap_interval(VALUES), bootstrap_interval(VALUES, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.06])
def test_the_p_value_is_scipys(shift):
    other = VALUES - shift + np.random.default_rng(2).normal(0, 0.15, len(VALUES))
    expected = permutation_test(
        (VALUES, other),
        lambda a, b: np.mean(a - b),
        permutation_type="samples",
        n_resamples=4000,
        rng=np.random.default_rng(3),
    ).pvalue
    assert paired_p_value(VALUES, other) == pytest.approx(expected, abs=0.03)


def test_the_same_scores_are_no_difference():
    assert paired_p_value(VALUES, VALUES) == 1.0


def test_nothing_to_average():
    with pytest.raises(ValueError, match="no scores to average. To fix, evaluate on at least one"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="no scores to compare. To fix, evaluate on at least one"):
        paired_p_value([], [])
