"""How sure a mean over queries or pairs is, and a difference of two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Samples of a bootstrap: the ends of a 95 % interval move by less than a tenth of its width.
SAMPLES = 2000


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: One score for each query, shape ``(n,)``.
        seed: Seed of the samples.
        level: Probability, in (0, 1).

    Raises:
        ValueError: If there are no values.
    """
    means = _resampled_means(np.asarray(values, np.float64), seed)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of a difference of means over the same queries, by random sign flips.

    Args:
        ours: Scores of one model, shape ``(n,)``.
        theirs: Scores of the other for the same queries.
        seed: Seed of the flips.

    Returns:
        In (0, 1]: the share of flips, the data's own included, whose difference is as large.

    Raises:
        ValueError: If the two differ in length or are empty.
    """
    difference = np.subtract(ours, theirs, dtype=np.float64)
    if not len(difference):
        raise ValueError("no scores to compare. To fix, evaluate on at least one query.")
    generator = np.random.default_rng(seed)
    observed, as_large = abs(difference.mean()), 1
    for _ in range(SAMPLES):
        signs = generator.choice((-1.0, 1.0), len(difference))
        as_large += abs((signs * difference).mean()) >= observed - 1e-12
    return as_large / (SAMPLES + 1)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    if not len(values):
        raise ValueError("no scores to average. To fix, evaluate on at least one query.")
    generator = np.random.default_rng(seed)
    return np.array(
        [values[generator.integers(len(values), size=len(values))].mean() for _ in range(SAMPLES)]
    )
