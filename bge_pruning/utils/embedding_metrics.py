"""How good vectors are: correlation with gold scores; alignment and uniformity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Vectors = np.ndarray
    Gold = Sequence[float] | np.ndarray


def compute_cosine_spearman(a: Vectors, b: Vectors, gold: Gold) -> float:
    """Spearman correlation of ``cos(a_i, b_i)`` with the gold scores, ``cosine_spearman`` in mteb.

    Args:
        a: Vectors of the first sentences, shape ``(B, H)``; any length, they are normalised here.
        b: Vectors of the second sentences, shape ``(B, H)``.
        gold: Gold similarity of each pair, shape ``(B,)``, in any unit.

    Returns:
        The correlation, in ``[-1, 1]``.

    Raises:
        ValueError: If the shapes disagree, there are fewer than two pairs, a vector is not finite,
            or either the gold scores or the similarities are all equal (the correlation is then
            undefined).
    """
    from scipy.stats import spearmanr

    return float(spearmanr(*_checked(a, b, gold)).statistic)


def compute_cosine_pearson(a: Vectors, b: Vectors, gold: Gold) -> float:
    """Pearson correlation of ``cos(a_i, b_i)`` with the gold scores, ``cosine_pearson`` in mteb.

    Args:
        a: Vectors of the first sentences, shape ``(B, H)``.
        b: Vectors of the second sentences, shape ``(B, H)``.
        gold: Gold similarity of each pair, shape ``(B,)``, in any unit.

    Returns:
        The correlation, in ``[-1, 1]``.

    Raises:
        ValueError: As ``compute_cosine_spearman``.
    """
    from scipy.stats import pearsonr

    return float(pearsonr(*_checked(a, b, gold)).statistic)


def compute_alignment(a: Tensor, b: Tensor, alpha: float = 2.0) -> float:
    """Mean distance of positive pairs, ``E |a - b|^alpha`` (Wang & Isola, 2020, arXiv:2005.10242).

    Args:
        a: L2-normalised vectors, shape ``(B, H)``.
        b: Vectors of texts that mean the same, shape ``(B, H)``.
        alpha: Exponent of the distance.

    Returns:
        In ``[0, 2 ** alpha]``; 0 if the vectors of each pair are the same.

    Raises:
        ValueError: If the shapes disagree or there are no pairs.
    """
    if a.ndim != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"vectors {tuple(a.shape)} and {tuple(b.shape)} are not (B, H) twice. To fix, give two "
            f"vectors of the same size for each pair, and at least one pair."
        )
    return float((a - b).norm(dim=1).pow(alpha).mean())


def compute_uniformity(vectors: Tensor, t: float = 2.0) -> float:
    """How evenly vectors fill the sphere, ``log E exp(-t |x - y|^2)`` (Wang & Isola, 2020).

    Args:
        vectors: L2-normalised vectors, shape ``(B, H)``.
        t: Inverse width of the kernel.

    Returns:
        In ``[-4 t, 0]``, over all pairs of different rows; lower is more even, and 0 means that
        all vectors are the same.

    Raises:
        ValueError: If there are fewer than two vectors.
    """
    import torch

    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(
            f"vectors {tuple(vectors.shape)} have no pairs. To fix, give two rows or more."
        )
    return float(torch.pdist(vectors).square().mul(-t).exp().mean().log())


def _checked(a: Vectors, b: Vectors, gold: Gold) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and gold scores, both float64 of shape ``(B,)``, fit to be correlated."""
    import numpy as np
    import torch

    left, right = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    scores = np.asarray(gold, dtype=np.float64)
    if left.ndim != 2 or left.shape != right.shape or scores.shape != left.shape[:1]:
        raise ValueError(
            f"a {tuple(left.shape)}, b {tuple(right.shape)} and gold {scores.shape} are not (B, "
            "H), (B, H) and (B,). To fix, give one vector of the same size for each sentence and "
            "one score for each pair."
        )
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} pairs have no correlation. To fix, give at least 2.")
    cosines = torch.cosine_similarity(left, right).numpy()
    for name, values in (("cosine similarity", cosines), ("gold score", scores)):
        _check_spread(name, values)
    return cosines, scores


def _check_spread(name: str, values: np.ndarray) -> None:
    """Refuses what ``scipy`` would turn into a silent NaN."""
    import numpy as np

    if not np.isfinite(values).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} values of the {name} are "
            "not finite. To fix, look for NaN or infinity in the weights or the data."
        )
    if np.ptp(values) == 0:
        raise ValueError(
            f"every {name} is {values[0]:g}, so the correlation is undefined. To fix, check that "
            "the tokenizer belongs to the model and that the file holds different scores."
        )
