"""How far the cosines that a model gives to pairs of texts are from those of another."""

from __future__ import annotations

import numpy as np

from bge_pruning.utils.embedding_metrics import is_flat

# Samples of a bootstrap: the ends of a 95 % interval move by less than a fifth of its width.
SAMPLED_TEXTS = 500


def cosine_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """One minus the correlation (Pearson) of the cosines of all pairs of different texts.

    A model that gives larger or smaller cosines throughout orders texts as the other does.

    Args:
        found: Cosines of all texts with all, shape ``(N, N)``.
        wanted: Those of the other model.

    Returns:
        In [0, 2]; 1 if the cosines of one side are all alike.
    """
    rows, columns = np.triu_indices(len(found), k=1)
    return _error(found[rows, columns], wanted[rows, columns])


def error_difference(
    found: np.ndarray, other: np.ndarray, wanted: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """By how much the error of one model is above that of another, as a 95 % interval over texts.

    Percentile bootstrap: texts are drawn with replacement, the same ones for both models; a text
    makes no pair with itself.

    Args:
        found: Cosines of the one, shape ``(N, N)``.
        other: Cosines of the other.
        wanted: Cosines that both are compared with.
        seed: Of the draws.
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
