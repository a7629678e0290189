"""The written-out gradient against autograd's, and what the gates do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bge_pruning.models.layer_norm import masked_layer_norm

EPS = 1e-5


def by_formula(u: Tensor, weight: Tensor, bias: Tensor, eps: float, z: Tensor) -> Tensor:
    n = z.sum()
    mean = (z * u).sum(-1, keepdim=True) / n
    variance = (z * (u - mean) ** 2).sum(-1, keepdim=True) / n
    return ((u - mean) / torch.sqrt(variance + eps) * weight + bias) * z


def arguments(dtype: torch.dtype = torch.float64, soft: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    z = torch.sigmoid(random(12)) if soft else (random(12) > 0).to(dtype)
    values = [2.0 * random(3, 5, 12) + 1.0, random(12), random(12), z]
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("soft", [True, False])
def test_values_and_gradients_are_the_formulas(soft):
    found = []
    for function in (masked_layer_norm, by_formula):
        u, weight, bias, z = arguments(soft=soft)
        y = function(u, weight, bias, EPS, z)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        found.append([y, u.grad, weight.grad, bias.grad, z.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


def test_gradcheck():
    u, weight, bias, z = arguments()
    assert torch.autograd.gradcheck(
        lambda *values: masked_layer_norm(*values[:3], EPS, values[3]), (u, weight, bias, z)
    )


def test_open_gates_are_layer_norm():
    u, weight, bias, _ = arguments()
    expected = torch.nn.functional.layer_norm(u, (12,), weight, bias, EPS)
    found = masked_layer_norm(u, weight, bias, EPS, torch.ones(12, dtype=u.dtype))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_statistics_are_float32_under_autocast():
    """In bfloat16 a mean of 1000 would swallow a spread of 1."""
    u, weight, bias, z = (value.detach() for value in arguments(torch.float32))
    expected = masked_layer_norm(u + 1000.0, weight, bias, EPS, z)
    with torch.autocast("cpu", torch.bfloat16):
        found = masked_layer_norm(u + 1000.0, weight, bias, EPS, z)
    assert torch.equal(found, expected)


def test_half_precision_in_and_gradient_out():
    u, weight, bias, z = (value.detach() for value in arguments(torch.float32))
    half = u.bfloat16().requires_grad_()
    y = masked_layer_norm(half, weight, bias, EPS, z)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert half.grad.dtype == torch.bfloat16
