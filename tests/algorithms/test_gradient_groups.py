"""Gradient norms of weights, gates and multipliers, clipped apart; means over the ranks."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.core import Event
from torch import nn

from bge_pruning.algorithms import gradient_groups as mean_gradients
from bge_pruning.algorithms.gradient_groups import GroupGradientClipping, MeanGradients
from bge_pruning.training import builders

# By parameter: its group and its gradient. The norms of the groups are 5, 13 and 0.5.
GRADIENTS = {
    "matrix": ("weights/decay", [[3.0, 0.0], [0.0, 0.0]]),
    "bias": ("weights/no_decay", [0.0, 4.0]),
    "gate": ("gates", [5.0, -12.0]),
    "lambda_1": ("multipliers", [0.3]),
    "lambda_2": ("multipliers", [0.4]),
}


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.zeros_like(torch.tensor(g))) for name, (_, g) in GRADIENTS.items()
    }


@pytest.fixture
def state(parameters) -> SimpleNamespace:
    groups: dict[str, list[nn.Parameter]] = {}
    for name, (group, gradient) in GRADIENTS.items():
        groups.setdefault(group, []).append(parameters[name])
        parameters[name].grad = torch.tensor(gradient)
    optimizer = torch.optim.AdamW([{"name": n, "params": p} for n, p in groups.items()])
    return SimpleNamespace(optimizers=[optimizer])


@pytest.fixture(params=["read before", "in part", "not read"])
def clip(request, state) -> Callable[[float], None]:
    """Clips; the norms have been read, or some of them, or none."""
    trained = [p for group in state.optimizers[0].param_groups for p in group["params"]]
    known = {"read before": trained, "in part": trained[1:3], "not read": []}[request.param]

    def apply(max_norm: float) -> None:
        norms = {p: p.grad.norm() for p in known if p.grad is not None}
        guard = SimpleNamespace(gradient_norms=lambda: norms)
        GroupGradientClipping(max_norm, guard).apply(Event.AFTER_TRAIN_BATCH, state, None)

    return apply


def test_groups_are_clipped_apart_and_parts_of_a_name_together(clip, parameters):
    clip(1.0)
    expected = {
        "matrix": [[0.6, 0.0], [0.0, 0.0]],  # / 5: with the bias, not apart from it
        "bias": [0.0, 0.8],
        "gate": [5 / 13, -12 / 13],
        "lambda_1": [0.3],  # its group's norm is 0.5 already
        "lambda_2": [0.4],
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, torch.tensor(gradient), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [13.0, 1e9])
def test_small_gradients_are_left_alone(max_norm, clip, parameters):
    clip(max_norm)
    for name, (_, gradient) in GRADIENTS.items():
        torch.testing.assert_close(parameters[name].grad, torch.tensor(gradient), rtol=1e-5, atol=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_gradient_spoils_its_group_only_and_a_missing_one_nothing(
    broken, clip, parameters
):
    parameters["gate"].grad[0] = broken
    parameters["bias"].grad = parameters["lambda_2"].grad = None
    clip(1.0)
    assert not parameters["gate"].grad.isfinite().all()
    assert parameters["matrix"].grad[0, 0] == pytest.approx(1.0, rel=1e-5)
    assert parameters["lambda_1"].grad[0] == pytest.approx(0.3)
    assert parameters["bias"].grad is parameters["lambda_2"].grad is None


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("max_norm", [1e-3, 0.0])
def test_the_optimizer_takes_clipped_gradients(max_norm, micro, tmp_path, train_tiny, monkeypatch):
    """Once per step, on the gradient of the whole batch; 0 switches clipping off."""
    norms = []
    build_optimizer = builders.build_optimizer

    def build(*arguments):
        optimizer = build_optimizer(*arguments)
        # After the step: the gradients are computed inside of it.
        optimizer.register_step_post_hook(lambda opt, *_: norms.append(gradient_norms(opt)))
        return optimizer

    monkeypatch.setattr(builders, "build_optimizer", build)
    sizes = (f"device_train_microbatch_size={micro}", "loss.distillation_similarity=0")
    train_tiny(tmp_path, "max_duration=2ba", *sizes, f"optimizer.max_grad_norm={max_norm}")
    assert len(norms) == 2
    for step in norms:
        assert step.keys() == {"weights", "gates", "multipliers"}
        expected = pytest.approx(max_norm, rel=1e-4)
        assert all(norm == expected if max_norm else norm > 1e-2 for norm in step.values())


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    squares: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = group["name"].partition("/")[0]
        grads = [p.grad.to_dense().double().numpy() for p in group["params"] if p.grad is not None]
        squares[name] = squares.get(name, 0.0) + sum((g**2).sum() for g in grads)
    return {name: float(np.sqrt(square)) for name, square in squares.items()}


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
    for one in (algorithm, GroupGradientClipping(1.0, SimpleNamespace())):
        # Between the backward pass and the optimizer's step.
        assert {e for e in Event if one.match(e, None)} == {Event.AFTER_TRAIN_BATCH}
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
