"""Alignment and uniformity by hand, and what cannot be correlated."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from bge_pruning.utils.embedding_metrics import compute_alignment, compute_uniformity, is_flat


def test_values_that_differ_by_rounding_alone_are_flat():
    assert is_flat(np.full(3, 0.5))
    assert is_flat(np.zeros(3))
    assert is_flat(np.array([1.0, 1.0 + 2e-7, 1.0 - 1e-7]))  # rounding in float32
    for values in ([0.1, 0.2], [0.99999, 1.0], [0.0, 1e-30], [0.1, float("nan")]):
        assert not is_flat(np.array(values))


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
    pairs = permutations(range(6), 2)
    kernel = [math.exp(-t * float((a[i] - a[j]).norm()) ** 2) for i, j in pairs]
    assert compute_uniformity(a, t) == pytest.approx(math.log(sum(kernel) / 30), abs=1e-12)
    assert compute_uniformity(torch.stack([a[0], a[0]]), t) == 0.0
    assert compute_uniformity(torch.stack([a[0], -a[0]]), t) == pytest.approx(-4 * t)
    crowded = torch.nn.functional.normalize(a + 3.0, dim=-1)
    assert compute_uniformity(a, t) < compute_uniformity(crowded, t)


def test_vectors_that_make_no_pairs():
    message = r"vectors \(2, 3\) and \(3, 3\) are not \(B, H\) twice\. To fix, give two vectors"
    with pytest.raises(ValueError, match=message):
        compute_alignment(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"vectors \(0, 3\) and \(0, 3\) are not"):
        compute_alignment(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match=r"vectors \(1, 3\) have no pairs\. To fix, give two rows"):
        compute_uniformity(torch.zeros(1, 3))
