"""Uncertainty of scores and of differences between two models; errors of cosines.

The resampling is our own, because published intervals and p-values depend on the order of the
random draws: ``scipy.stats.permutation_test`` draws other exchanges, and ``scipy.stats.bootstrap``
has no vectorised Spearman correlation. The tests compare both with SciPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bge_pruning.utils.embedding_metrics import is_flat

# Samples of a bootstrap: the ends of a 95 % interval move by less than a tenth of its width.
SAMPLES = 2000
# Numbers that are drawn and held in memory at once.
BLOCK = 1 << 22
# Tolerance for the rounding of sums in another order.
ROUNDING = 1e-12


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one score for each query."""
    return interval_of(bootstrap_means(values, seed), level)


def bootstrap_correlation_interval(
    similarity: np.ndarray, gold: np.ndarray, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the Spearman correlation over pairs, ``(n,)`` each."""
    return interval_of(bootstrap_correlations(similarity, gold, seed), level)


def bootstrap_means(values: Sequence[float] | np.ndarray, seed: int = 0) -> np.ndarray:
    """Mean of one score for each query in every sample of a bootstrap, ``(SAMPLES,)``."""
    values = np.asarray(values, np.float64)
    return _resample(len(values), lambda chosen: values[chosen].mean(axis=1), seed)


def bootstrap_correlations(similarity: np.ndarray, gold: np.ndarray, seed: int = 0) -> np.ndarray:
    """Spearman correlation over pairs in every sample of a bootstrap, ``(SAMPLES,)``."""
    return _resample(len(gold), lambda chosen: _spearman(similarity[chosen], gold[chosen]), seed)


def interval_of(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a score in every sample of a bootstrap."""
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def paired_p_value(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, seed: int = 0
) -> float:
    """Two-sided p-value of a difference of means over the same queries, by random sign flips.

    The p-value, in (0, 1], is the share of flips, the data's own included, with as large a
    difference.
    """
    difference = np.subtract(ours, theirs, dtype=np.float64)
    _check_count(len(difference))
    generator = np.random.default_rng(seed)
    observed, as_large = abs(difference.mean()), 1
    for rows in _blocks(len(difference)):
        signs = generator.choice((-1.0, 1.0), (rows, len(difference)))
        means = np.abs((signs * difference).mean(axis=1))
        as_large += np.count_nonzero(means >= observed - ROUNDING)
    return as_large / (SAMPLES + 1)


def paired_correlation_p_value(
    ours: np.ndarray, theirs: np.ndarray, gold: np.ndarray, seed: int = 0
) -> float:
    """Two-sided p-value of a difference of two Spearman correlations over the same pairs.

    The models' ranks of a pair are exchanged at random: if neither model is better, that changes
    the difference by chance only. The p-value, in (0, 1], is the share of exchanges, none included,
    with as large a difference.
    """
    from scipy.stats import rankdata

    _check_count(len(gold))
    generator = np.random.default_rng(seed)
    first, second = rankdata(ours), rankdata(theirs)
    observed = abs(_spearman(first[None], gold[None]) - _spearman(second[None], gold[None]))[0]
    as_large = 1
    for rows in _blocks(len(gold)):
        swapped = generator.integers(2, size=(rows, len(gold))).astype(bool)
        gold_rows = np.broadcast_to(gold, swapped.shape)
        a, b = np.where(swapped, second, first), np.where(swapped, first, second)
        differences = np.abs(_spearman(a, gold_rows) - _spearman(b, gold_rows))
        as_large += np.count_nonzero(differences >= observed - ROUNDING)
    return as_large / (SAMPLES + 1)


def _spearman(values: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Spearman correlation row by row, shape ``(rows,)``.

    The correlation of equal values is 0, not undefined: otherwise the interval of a sparse model
    would lack the samples without any of its few pairs that have a similarity.
    """
    from scipy.stats import rankdata

    a, b = (rankdata(part, axis=1) for part in (values, gold))
    a, b = (part - part.mean(axis=1, keepdims=True) for part in (a, b))
    spread = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), spread, out=np.zeros(len(a)), where=spread > 0)


def _blocks(size: int) -> Iterator[int]:
    """Sizes of the groups of samples that are drawn together, ``SAMPLES`` in all."""
    rows = max(1, min(SAMPLES, BLOCK // size))
    for start in range(0, SAMPLES, rows):
        yield min(rows, SAMPLES - start)


def _resample(count: int, statistic: Callable[[np.ndarray], np.ndarray], seed: int) -> np.ndarray:
    """A statistic of the indices of samples, shape ``(rows, count)``, in every sample."""
    _check_count(count)
    generator = np.random.default_rng(seed)
    found = [statistic(generator.integers(count, size=(rows, count))) for rows in _blocks(count)]
    return np.concatenate(found)


def _check_count(count: int) -> None:
    if not count:
        raise ValueError("no scores to compare. To fix, evaluate on at least one query or pair.")


# Samples of a bootstrap over texts: the ends of a 95 % interval move by less than a fifth of it.
SAMPLED_TEXTS = 500


def cosine_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """One minus the correlation (Pearson) of the cosines of all pairs of different texts.

    A model whose cosines are larger or smaller throughout has no error: it orders texts alike. The
    cosines are ``(N, N)``. The error is in [0, 2]; 1 if the cosines of one side are all equal.
    """
    rows, columns = np.triu_indices(len(found), k=1)
    return _error(found[rows, columns], wanted[rows, columns])


def error_difference(
    found: np.ndarray, other: np.ndarray, wanted: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the difference between the errors of two models, over texts.

    Percentile bootstrap: texts are drawn with replacement, the same ones for both models; a text is
    never paired with itself. All cosines are ``(N, N)``; both models are compared with ``wanted``.
    """
    generator = np.random.default_rng(seed)
    rows, columns = np.triu_indices(len(found), k=1)
    differences = []
    for _ in range(SAMPLED_TEXTS):
        texts = generator.integers(len(found), size=len(found))
        i, j = texts[rows], texts[columns]
        i, j = i[i != j], j[i != j]
        differences.append(_error(found[i, j], wanted[i, j]) - _error(other[i, j], wanted[i, j]))
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    if is_flat(found) or is_flat(wanted):
        return 1.0
    return 1.0 - float(np.corrcoef(found, wanted)[0, 1])
