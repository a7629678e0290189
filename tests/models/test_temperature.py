"""A learned temperature stays in its range."""

import pytest
import torch

from bge_pruning.models.objective import HIGHEST, LOWEST, LearnedTemperature


@pytest.mark.parametrize("start", [0.0051, 0.02, 0.1, 0.99])
def test_it_starts_where_it_is_told_to(start):
    assert float(LearnedTemperature(start)()) == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_no_step_takes_it_out_of_its_range(sign):
    temperature = LearnedTemperature(0.02)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1e4)
    for _ in range(20):
        (sign * temperature()).backward()
        optimizer.step()
    assert torch.tensor(LOWEST) <= temperature() <= torch.tensor(HIGHEST)


@pytest.mark.parametrize("start", [0.0, LOWEST, HIGHEST, 2.0, float("nan")])
def test_a_start_outside_the_range_is_refused(start):
    with pytest.raises(ValueError, match=rf"cannot start at {start}.*To fix, set loss.temperature"):
        LearnedTemperature(start)
