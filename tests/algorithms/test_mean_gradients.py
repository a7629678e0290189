"""Gradients of a sharded run are means over the ranks."""

from types import SimpleNamespace

import pytest
import torch
from composer.core import Event
from torch import nn

from bge_pruning.algorithms import gradient_groups as mean_gradients
from bge_pruning.algorithms.gradient_groups import MeanGradients


class Sharded:
    """Stands for a parameter of which this rank holds a part."""

    def __init__(self, gradient: float) -> None:
        self.grad = torch.full((2,), gradient)


@pytest.fixture
def messages(monkeypatch):
    """What was sent; the other rank's gradients are three times as large."""
    sent = []

    def all_reduce(message):
        sent.append(message.clone())
        message.mul_(4)

    monkeypatch.setattr(mean_gradients, "DTensor", Sharded)
    monkeypatch.setattr(mean_gradients.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(mean_gradients.dist, "get_world_size", lambda: 2)
    return sent


def apply(parameters, scale=1.0):
    state = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"params": parameters}])])
    algorithm = MeanGradients(scale)
    assert algorithm.match(Event.AFTER_TRAIN_BATCH, state)
    assert not algorithm.match(Event.BATCH_END, state)
    algorithm.apply(Event.AFTER_TRAIN_BATCH, state, None)


def test_whole_gradients_are_averaged_in_one_message(messages):
    scalar, matrix, idle = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.ones(2, 2)), None
    scalar.grad, matrix.grad = torch.tensor(1.0), torch.arange(4.0).view(2, 2)
    idle = nn.Parameter(torch.ones(1))
    apply([scalar, matrix, idle])
    assert [len(message) for message in messages] == [5]
    assert float(scalar.grad) == 2.0
    assert matrix.grad.tolist() == [[0.0, 2.0], [4.0, 6.0]]
    assert idle.grad is None


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 6.0), (2.0, 3.0)])
def test_sharded_gradients_are_divided_where_the_backend_did_not(scale, expected, messages):
    parameter = Sharded(6.0)
    apply([parameter], scale)
    assert parameter.grad.tolist() == [expected] * 2
    assert messages == []
