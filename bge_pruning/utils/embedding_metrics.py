"""Alignment and uniformity of vectors, and values that cannot be correlated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Similarities in float32 differ by this share through rounding alone.
ROUNDING = 1e-6


def is_flat(values: np.ndarray) -> bool:
    """Whether ``(n,)`` values differ by rounding at most, so that their order is chance."""
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max())


def compute_alignment(a: Tensor, b: Tensor, alpha: float = 2.0) -> float:
    """Mean distance of positive pairs, ``E |a - b|^alpha`` (Wang & Isola, 2020, arXiv:2005.10242).

    Args:
        a: L2-normalised vectors, shape ``(B, H)``.
        b: Vectors of texts that mean the same, shape ``(B, H)``.
        alpha: Exponent of the distance.

    Returns:
        In ``[0, 2 ** alpha]``; 0 if the vectors of each pair are the same.
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
        vectors: L2-normalised, shape ``(B, H)``.
        t: Inverse width of the kernel.

    Returns:
        In ``[-4 t, 0]``, over all pairs of different rows; lower is more even, and 0 means that
        all vectors are the same.
    """
    import torch

    if vectors.ndim != 2 or len(vectors) < 2:
        raise ValueError(
            f"vectors {tuple(vectors.shape)} have no pairs. To fix, give two rows or more."
        )
    return float(torch.pdist(vectors).square().mul(-t).exp().mean().log())
