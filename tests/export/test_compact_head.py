"""A narrow multi-vector head has the scores of the wide one."""

import pytest
import torch
from torch import nn

from bge_pruning.export.compact_head import compute_span, square_head


def make(hidden: int, outputs: int, seed: int = 0) -> tuple[nn.Linear, nn.LayerNorm]:
    torch.manual_seed(seed)
    head, norm = nn.Linear(hidden, outputs).double(), nn.LayerNorm(hidden).double()
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.5)
    nn.init.normal_(head.bias, 0.0, 2.0)  # far from what the weights reach
    return head, norm


@pytest.mark.parametrize(("hidden", "outputs"), [(8, 12), (24, 32), (8, 8), (2, 9), (8, 3)])
def test_lengths_and_products_stay(hidden, outputs):
    head, norm = make(hidden, outputs)
    narrow = square_head(head, norm)
    assert narrow.weight.shape == (hidden, hidden)
    h = norm(torch.randn(50, hidden, dtype=torch.float64))
    wide, small = head(h), narrow(h)
    torch.testing.assert_close(small @ small.T, wide @ wide.T, atol=1e-10, rtol=1e-10)
    cosines = [nn.functional.normalize(v, dim=1) for v in (wide, small)]
    torch.testing.assert_close(cosines[1] @ cosines[1].T, cosines[0] @ cosines[0].T)


def test_a_basis_is_orthonormal_and_the_bias_needs_the_layer_norm():
    """Without its mean of 0, H inputs and a bias would span H + 1 directions."""
    head, norm = make(8, 12)
    narrow = square_head(head, norm)
    h = torch.randn(50, 8, dtype=torch.float64)
    wide, small = head(h), narrow(h)
    assert (small @ small.T - wide @ wide.T).abs().max() > 1e-3
    basis = compute_span(*make(8, 12))
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64))


def test_float32_heads_stay_float32():
    head, norm = make(24, 32)
    head, norm = head.float(), norm.float()
    narrow = square_head(head, norm)
    assert narrow.weight.dtype == torch.float32
    h = norm(torch.randn(20, 24))
    vectors = [nn.functional.normalize(v, dim=1) for v in (head(h), narrow(h))]
    torch.testing.assert_close(
        vectors[1] @ vectors[1].T, vectors[0] @ vectors[0].T, atol=2e-6, rtol=0
    )
