"""Fits against torch's least squares, and the order of elimination against trying all."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from bge_pruning.selection.least_squares import Moments, elimination_order, fit_, joined

TOKENS, INPUTS, OUTPUTS = 200, 6, 3


@pytest.fixture
def inputs() -> Tensor:
    """Correlated inputs, so that some can stand in for others."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(TOKENS, INPUTS, generator=generator)
    return mixed @ torch.randn(INPUTS, INPUTS, generator=generator) + 0.3


@pytest.fixture
def wanted() -> Tensor:
    return torch.randn(TOKENS, OUTPUTS, generator=torch.Generator().manual_seed(1))


def moments_of(x: Tensor, y: Tensor) -> Moments:
    moments = Moments(x.shape[1], y.shape[1])
    for rows in torch.arange(len(x)).split(64):
        moments.add(x[rows], y[rows], torch.ones(len(x[rows])))
    return moments


def least_error(x: Tensor, y: Tensor) -> float:
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    best = torch.linalg.lstsq(x, y.double()).solution
    return float((x @ best - y).square().sum())


def test_it_is_the_least_squares_fit_and_what_is_right_or_held_by_a_ridge_stays(inputs, wanted):
    linear = nn.Linear(INPUTS, OUTPUTS)
    fit_(linear, moments_of(inputs, wanted), ridge=1e-12)
    error = float((linear(inputs) - wanted).double().square().sum().detach())
    assert error == pytest.approx(least_error(inputs, wanted), rel=1e-5)
    linear = nn.Linear(INPUTS, OUTPUTS)
    before = joined(linear)
    fit_(linear, moments_of(inputs, linear(inputs).detach()), ridge=0.1)
    torch.testing.assert_close(joined(linear), before, atol=1e-6, rtol=0)
    fit_(linear, moments_of(inputs, wanted), ridge=1e9)
    torch.testing.assert_close(joined(linear), before, atol=1e-5, rtol=0)
    # Inputs that are all 0 change the bias alone.
    before = linear.weight.detach().clone()
    fit_(linear, moments_of(torch.zeros(TOKENS, INPUTS), torch.ones(TOKENS, OUTPUTS)), ridge=1e-9)
    assert torch.equal(linear.weight, before)
    torch.testing.assert_close(linear.bias.detach(), torch.ones(OUTPUTS))


def test_a_token_of_weight_two_counts_as_two_and_broken_numbers_are_refused(inputs, wanted):
    weights = torch.randint(1, 4, (TOKENS,), generator=torch.Generator().manual_seed(2))
    weighted = Moments(INPUTS, OUTPUTS)
    weighted.add(inputs, wanted, weights)
    repeated = moments_of(*(x.repeat_interleave(weights, 0) for x in (inputs, wanted)))
    torch.testing.assert_close(weighted.xx, repeated.xx, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(weighted.xy, repeated.xy, rtol=1e-5, atol=1e-3)
    with pytest.raises(ValueError, match="not finite. To fix, check the weights"):
        fit_(nn.Linear(INPUTS, OUTPUTS), moments_of(inputs, inputs[:, :OUTPUTS] / 0.0))


@pytest.mark.parametrize("group", [1, 2])
def test_each_time_the_best_group_goes(group, inputs):
    linear = nn.Linear(INPUTS, OUTPUTS)
    wanted = linear(inputs).detach()
    order = elimination_order(
        moments_of(inputs, wanted).xx, joined(linear), group, ridge=1e-12
    ).tolist()
    groups = INPUTS // group
    assert sorted(order) == list(range(groups))
    alive = list(range(groups))
    for going in order[:-1]:
        errors = {}
        for gone in alive:
            rows = [g * group + i for g in alive if g != gone for i in range(group)]
            errors[gone] = least_error(inputs[:, rows], wanted)
        assert going == min(errors, key=errors.get)
        alive.remove(going)


@pytest.mark.parametrize("copies", [2, 3])
def test_of_inputs_that_are_alike_one_stays(copies):
    """Each costs nothing while the other is there; a block of a round took both."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(800, 96, generator=generator)
    alike = [80, 30, 55][:copies]
    x[:, alike] = x[:, alike[:1]] + 0.05 * torch.randn(800, copies, generator=generator)
    linear = nn.Linear(96, 4)
    wanted = linear(x).detach()
    xx = moments_of(x, wanted).xx
    order = elimination_order(xx, joined(linear), ridge=1e-12).tolist()
    assert set(order[: copies - 1]) < set(alike)
    kept = [index for index in range(96) if index not in order[:3]]  # a block
    one_by_one = []
    for _ in range(3):
        left = [index for index in range(96) if index not in one_by_one]
        without = {i: least_error(x[:, [j for j in left if j != i]], wanted) for i in left}
        one_by_one.append(min(without, key=without.get))
    best = [index for index in range(96) if index not in one_by_one]
    assert least_error(x[:, kept], wanted) == pytest.approx(least_error(x[:, best], wanted))


def test_blocks_and_pairs_that_are_kept_are_the_best():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    linear = nn.Linear(64, 8)
    wanted = linear(x).detach()
    order = elimination_order(moments_of(x, wanted).xx, joined(linear), ridge=1e-12)
    chance = [torch.randperm(64, generator=generator)[:32] for _ in range(20)]
    error = least_error(x[:, order[32:]], wanted)
    assert error < 0.8 * min(least_error(x[:, kept], wanted) for kept in chance)
    x = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(5))
    linear = nn.Linear(4, 2)
    wanted = linear(x).detach()
    order = elimination_order(moments_of(x, wanted).xx, joined(linear), ridge=1e-12).tolist()
    errors = {pair: least_error(x[:, list(pair)], wanted) for pair in combinations(range(4), 2)}
    assert tuple(sorted(order[2:])) == min(errors, key=errors.get)
