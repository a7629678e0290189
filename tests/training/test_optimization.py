"""The optimizer's groups and its learning rates."""

import math

import pytest
import torch
from composer.core import State, Timestamp
from composer.devices import DeviceCPU

from bge_pruning.training.builders import build_optimizer, build_scheduler


def test_groups_of_a_run_with_gates(configure, build_all):
    rates = ("lr=1e-3", "l0_lr=0.2", "lagrangian_lr=0.3", "lambda_2_lr=0.4")
    config = configure(*(f"optimizer.{rate}" for rate in rates))
    _, model = build_all(config)
    optimizer = build_optimizer(config, model)
    groups = {group["name"]: group for group in optimizer.param_groups}
    multipliers = ["multipliers/lambda_1", "multipliers/lambda_2"]
    assert list(groups) == ["weights/decay", "weights/no_decay", "gates", *multipliers]
    assert [group["lr"] for group in groups.values()] == [1e-3, 1e-3, 0.2, 0.3, 0.4]
    assert {n for n, g in groups.items() if g["weight_decay"]} == {"weights/decay"}
    assert {n for n, g in groups.items() if g["maximize"]} == set(multipliers)
    names = {p: name for name, p in model.named_parameters()}
    for parameter in groups["weights/decay"]["params"]:
        name = names[parameter]
        assert "dense.weight" in name or name.split(".")[-2] in ("query", "key", "value")
        assert parameter.ndim == 2
    for parameter in groups["weights/no_decay"]["params"]:
        assert parameter.ndim == 1 or "embeddings" in names[parameter]
    assert {names[p].split(".")[1] for p in groups["gates"]["params"]} == {"log_alpha"}
    trained = [names[p] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_a_run_without_gates_has_weights_only(configure, build_all):
    config = configure(
        "model.l0_module=null",
        "optimizer={weight_decay: 0.25, betas: [0.5, 0.75], eps: 1.0e-3, lr: 0.125}",
    )
    _, model = build_all(config)
    optimizer = build_optimizer(config, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay, rest = optimizer.param_groups
    assert (decay["name"], rest["name"]) == ("weights/decay", "weights/no_decay")
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    for group in (decay, rest):
        assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.75), 1e-3, 0.125)
        assert not group["maximize"]
    # Frozen weights are not optimised.
    model.backbone.embeddings.requires_grad_(False)
    model.backbone.encoder.layer[0].requires_grad_(False)
    optimized = {p for g in build_optimizer(config, model).param_groups for p in g["params"]}
    assert optimized == {p for p in model.parameters() if p.requires_grad}
    assert model.backbone.embeddings.word_embeddings.weight not in optimized


def factor(name: str, step: int, alpha_f: float, warmup: int = 4, last: int = 20) -> float:
    """Learning-rate factor by the textbook."""
    if step < warmup:
        return step / warmup
    share = (step - warmup) / (last - warmup)
    if name == "constant":
        return 1.0
    shape = 1 - share if name == "linear" else (1 + math.cos(math.pi * share)) / 2
    return alpha_f + (1 - alpha_f) * shape


@pytest.mark.parametrize("warmup", ["4ba", "0.2dur"])
@pytest.mark.parametrize("alpha_f", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rate_schedules(name, alpha_f, warmup, configure):
    config = configure(
        f"scheduler.name={name}", f"scheduler.alpha_f={alpha_f}", f"scheduler.t_warmup={warmup}"
    )
    schedule = build_scheduler(config)
    state = State(torch.nn.Linear(1, 1), 0, "run", DeviceCPU(), max_duration="20ba")
    for step in range(21):
        state.timestamp = Timestamp(batch=step)
        assert schedule(state, 1.0) == pytest.approx(factor(name, step, alpha_f), abs=1e-9)
