"""The gate against its paper's formulas, written out again, and against quantiles of its noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bge_pruning.models import hard_concrete

LOCATIONS = [-5.0, hard_concrete.THRESHOLD, -0.3, 0.0, 1.0, 4.0]
fast = settings(max_examples=60, deadline=None, derandomize=True)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def double(values: float | list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quantiles(n: int = 200_001) -> Tensor:
    """The noise without its chance: evenly spaced in the open interval (0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("log_alpha", LOCATIONS)
@pytest.mark.parametrize("u", [1e-6, 0.04, 0.5, 0.77, 1 - 1e-6])
def test_sample_is_the_papers_formula(log_alpha, u):
    s = sigmoid((math.log(u) - math.log(1.0 - u) + log_alpha) / (2 / 3))
    expected = min(1.0, max(0.0, s * 1.2 - 0.1))
    z = hard_concrete.sample(double(log_alpha), double(u))
    assert float(z) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("log_alpha", LOCATIONS)
def test_shares_of_open_and_of_fully_open_samples(log_alpha):
    z = hard_concrete.sample(double(log_alpha), quantiles())
    p = hard_concrete.open_probability(double(log_alpha))
    assert float(p) == pytest.approx(sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1)), abs=1e-12)
    assert float((z > 0).double().mean()) == pytest.approx(float(p), abs=1e-5)
    # z reaches 1 where s is at least (1 - GAMMA) / (ZETA - GAMMA) = 11/12, whose logit is log 11.
    expected = sigmoid(log_alpha - 2 / 3 * math.log(11.0))
    assert float((z == 1).double().mean()) == pytest.approx(expected, abs=1e-5)


def test_clamp_is_symmetric_in_probability_and_gradients_are_true_between():
    low, high = hard_concrete.open_probability(
        double([hard_concrete.LOG_ALPHA_MIN, hard_concrete.LOG_ALPHA_MAX])
    ).tolist()
    assert high == pytest.approx(sigmoid(math.log(100.0) + 2 / 3 * math.log(11.0)), abs=1e-12)
    assert round(high, 3) == 0.998
    assert low == pytest.approx(1.0 - high, abs=1e-12)
    log_alpha = double([-1.0, 0.0, 0.7]).requires_grad_()
    u = double([0.6, 0.4, 0.5])
    z = hard_concrete.sample(log_alpha, u)
    assert ((z > 0.05) & (z < 0.95)).all()
    assert torch.autograd.gradcheck(lambda a: hard_concrete.sample(a, u), log_alpha)
    assert torch.autograd.gradcheck(hard_concrete.open_probability, log_alpha)


@pytest.mark.parametrize(
    "log_alpha", [hard_concrete.LOG_ALPHA_MIN, 0.0, hard_concrete.LOG_ALPHA_MAX]
)
def test_extreme_noise_is_no_nan(log_alpha):
    # What float32 noise can be: its smallest normal number, and the last number before 1.
    u = torch.tensor([torch.finfo(torch.float32).tiny, 1.0 - 2.0**-24])
    a = torch.full((2,), log_alpha, requires_grad=True)
    z = hard_concrete.sample(a, u)
    assert z.tolist() == [0.0, 1.0]
    z.sum().backward()
    assert a.grad.isfinite().all()


def loop_top_k(values: list[float], k: int) -> list[float]:
    gates = [0.0] * len(values)
    for _ in range(k):
        closed = [i for i, gate in enumerate(gates) if not gate]
        best = max(values[i] for i in closed)
        gates[next(i for i in closed if values[i] == best)] = 1.0
    return gates


@fast
@given(st.data())
def test_top_k_is_the_loop(data):
    # Few distinct values, so that most examples have ties.
    values = data.draw(st.lists(st.sampled_from([-2.0, 0.5, 1.0, 3.0]), min_size=1, max_size=40))
    k = data.draw(st.integers(0, len(values)))
    assert hard_concrete.top_k(torch.tensor(values), k).tolist() == loop_top_k(values, k)


def test_top_k_of_every_row_and_of_infinities():
    log_alpha = double([[[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]]).requires_grad_()
    z = hard_concrete.top_k(log_alpha, 2)
    assert z.tolist() == [[[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]]
    assert z.dtype == torch.float64 and not z.requires_grad
    log_alpha = torch.tensor([float("-inf"), 0.0, float("inf")])
    assert hard_concrete.top_k(log_alpha, 1).tolist() == [0.0, 0.0, 1.0]
    assert hard_concrete.top_k(log_alpha, 2).tolist() == [0.0, 1.0, 1.0]
    assert hard_concrete.top_k(torch.zeros(0), 0).tolist() == []


@pytest.mark.parametrize(
    ("gates", "k", "message"),
    [
        ([0.0] * 3, 4, r"^k 4 is not in \[0, 3\], the number of gates\. To fix, choose fewer\.$"),
        ([0.0] * 3, -1, r"^k -1 is not in \[0, 3\], .* To fix, choose 0 or more\.$"),
        # It sorts above every number: broken gates would be the kept ones.
        ([2.0, math.nan, 1.0], 1, r"log_alpha.*1 of 3.*NaN.*To fix"),
    ],
)
def test_top_k_refuses_a_wrong_number_and_nan(gates, k, message):
    with pytest.raises(ValueError, match=message):
        hard_concrete.top_k(torch.tensor(gates), k)


def test_constants_are_the_papers():
    assert (hard_concrete.GAMMA, hard_concrete.ZETA, hard_concrete.BETA) == (-0.1, 1.1, 2 / 3)
    assert pytest.approx(2 / 3 * math.log(0.1 / 1.1), abs=1e-15) == hard_concrete.THRESHOLD
