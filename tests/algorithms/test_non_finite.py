"""Numbers that are none: noticed in their step, by name; the run stops or leaves the step out."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer.core import Event, Precision
from torch import nn

from bge_pruning.algorithms import non_finite
from bge_pruning.algorithms.gradient_groups import GroupGradientClipping
from bge_pruning.algorithms.non_finite import (
    NonFiniteGuard,
    Reading,
    compute_norms,
    describe,
    describe_losses,
    watched_parameters,
)
from bge_pruning.config.load import ConfigError, load_config
from bge_pruning.export.extract import extract
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.training import builders

ROOT = Path(__file__).parents[2]
SKIP = "optimizer.non_finite=skip"
EVERY = ("save_interval=1ba", "checkpoints_to_keep=9")
WEIGHT = "backbone.encoder.layer.2.output.dense.weight"
GATES = "l0_module.log_alpha.head"


def metric(run: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["metrics"][key] for row in rows if key in row["metrics"]]


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Messages reach caplog, whatever a test before has set up."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)


@pytest.fixture
def break_loss(monkeypatch) -> Callable[..., None]:
    """A function that makes a part of the loss and the total broken in some steps, from 1."""

    def apply(*steps: int, part: str = "distillation_alignment", value: float = math.nan) -> None:
        loss = ComposerBGEM3.loss

        def broken(self, outputs, batch):
            parts = loss(self, outputs, batch)
            if self.l0_module.step + 1 in steps:
                # As it is with a broken target: the gradient of all that leads here is broken.
                parts[part] = parts["total"] = parts["total"] * value
            return parts

        monkeypatch.setattr(ComposerBGEM3, "loss", broken)

    return apply


@pytest.fixture
def with_optimizer(monkeypatch) -> Callable[..., None]:
    """A function that shows a function the model and its optimizer before the training."""

    def apply(look: Callable[[ComposerBGEM3, torch.optim.Optimizer], None]) -> None:
        build = builders.build_optimizer

        def show(config, model):
            optimizer = build(config, model)
            look(model, optimizer)
            return optimizer

        monkeypatch.setattr(builders, "build_optimizer", show)

    return apply


@pytest.fixture
def break_gradient(with_optimizer) -> Callable[..., None]:
    """A function that breaks the gradient of one tensor in some steps; the loss stays whole."""

    def apply(name: str, *steps: int, value: float = math.nan) -> None:
        def look(model, _):
            def spoil(gradient):
                if model.l0_module.step + 1 not in steps:
                    return gradient
                broken = gradient.clone()
                broken.view(-1)[-1] = value
                return broken

            dict(model.named_parameters())[name].register_hook(spoil)

        with_optimizer(look)

    return apply


@pytest.fixture
def break_tensor(with_optimizer) -> Callable[[str, int], None]:
    """A function that breaks a trained tensor in the optimizer's step of a number, from 1."""

    def apply(name: str, step: int) -> None:
        def look(model, optimizer):
            def spoil(*_: object) -> None:
                if model.l0_module.step + 1 == step:
                    dict(model.named_parameters())[name].data.view(-1)[0] = math.nan

            optimizer.register_step_post_hook(spoil)

        with_optimizer(look)

    return apply


# Stop


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_loss_stops_the_run(value, tmp_path, train_tiny, break_loss):
    break_loss(3, value=value)
    message = (
        r"^step 3, source train: loss part distillation_alignment is not finite\. To fix, lower "
        r"optimizer\.lr or look for broken texts in that source, or leave such steps out with "
        r"optimizer\.non_finite=skip\. The last checkpoint is kept, and autoresume=true goes on"
    )
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path, *EVERY)
    assert newest(tmp_path) == "ba2-rank0.pt"


def newest(folder: Path) -> str:
    return (folder / "runs/tiny/latest-rank0.pt").resolve().name


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize(
    ("name", "kind", "advice"),
    [
        (WEIGHT, "weight", r"lower optimizer\.lr or look for broken texts in that source"),
        (GATES, "gate", r"lower optimizer\.l0_lr"),
        ("l0_module.lambda_1.layer", "multiplier", r"lower optimizer\.lagrangian_lr and"),
    ],
)
def test_a_broken_gradient_with_a_whole_loss_stops_the_run(
    name, kind, advice, micro, tmp_path, train_tiny, break_gradient
):
    break_gradient(name, 3)
    message = (
        rf"^step 3, source train: the gradient of {kind} {name} is not finite \(nan\)\. To fix, "
        rf"{advice}"
    )
    sizes = (f"device_train_microbatch_size={micro}", "loss.distillation_similarity=0")
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path, *EVERY, *sizes)
    assert newest(tmp_path) == "ba2-rank0.pt"


@pytest.mark.parametrize(
    ("name", "kind", "key"),
    [
        (WEIGHT, "weight", "lr"),
        (GATES, "gate", "l0_lr"),
        ("l0_module.lambda_2.hidden", "multiplier", "lagrangian_lr"),
    ],
)
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_a_tensor_broken_by_the_step_stops_the_run_in_it(
    mode, name, kind, key, tmp_path, train_tiny, break_tensor
):
    """There is nothing to leave out any more, whatever the mode."""
    break_tensor(name, 3)
    message = rf"^step 3, .*: {kind} {name} is not finite \(nan\)\. To fix, lower optimizer\.{key}"
    with pytest.raises(RuntimeError, match=message) as caught:
        train_tiny(tmp_path, *EVERY, f"optimizer.non_finite={mode}")
    assert "leave such steps out" not in str(caught.value)
    assert newest(tmp_path) == "ba2-rank0.pt"


def test_the_run_goes_on_from_the_checkpoint_before(
    tmp_path, train_tiny, break_gradient, monkeypatch, load_state, assert_same
):
    whole = train_tiny(tmp_path / "whole", *EVERY)
    with monkeypatch.context():
        break_gradient(WEIGHT, 3, value=math.inf)
        with pytest.raises(RuntimeError, match=rf"{WEIGHT} is not finite \(inf\)"):
            train_tiny(tmp_path / "parts", *EVERY)
    monkeypatch.undo()
    stopped = tmp_path / "parts" / "runs" / "tiny"
    before = load_state(whole / "ba2-rank0.pt"), load_state(stopped / "ba2-rank0.pt")
    assert_same(before[1]["model"], before[0]["model"])
    resumed = train_tiny(tmp_path / "parts", *EVERY, "autoresume=true")
    for part in ("model", "optimizers"):
        assert_same(load_state(resumed)[part], load_state(whole)[part], where=part)


def test_a_gradient_whose_square_overflows_is_broken(tmp_path, train_tiny, break_gradient):
    break_gradient(WEIGHT, 2, value=1e25)
    message = rf"the gradient of weight {WEIGHT} is too large for AdamW \(1e\+25\)"
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path, "optimizer.max_grad_norm=0")


def test_a_broken_operation_is_named_before_what_it_spoils(tmp_path, train_tiny, with_optimizer):
    """In layer 2 of 4 the backward pass breaks: layers 0 to 2 inherit it, layer 3 does not."""

    def look(model, _):
        def spoil(module, inputs, output):
            if model.training and model.l0_module.step + 1 == 2:
                output.register_hook(lambda gradient: gradient * math.nan)

        model.backbone.encoder.layer[2].attention.self.register_forward_hook(spoil)

    with_optimizer(look)
    message = (
        r"the gradient of weight backbone\.encoder\.layer\.2\.attention\.self\.value\.bias is "
        r"not finite \(nan\), and so are \d\d other tensors"
    )
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path)


# Skip


def test_skip_leaves_everything_as_it_was(
    tmp_path, train_tiny, break_loss, load_state, assert_same, caplog
):
    break_loss(3)
    run = train_tiny(tmp_path, *EVERY, SKIP, report=True)
    before, after = (load_state(run / f"ba{step}-rank0.pt") for step in (2, 3))
    assert_same(after["model"], before["model"])
    moments = [{k: s["optimizers"]["AdamW"][k] for k in ("state",)} for s in (before, after)]
    assert_same(*moments)
    last = load_state(run / "ba4-rank0.pt")
    assert not torch.equal(last["model"][WEIGHT], after["model"][WEIGHT])
    assert all(v.isfinite().all() for v in last["model"].values() if v.is_floating_point())
    assert metric(run, "numerics/skipped_steps") == [1]
    assert dict(last["algorithms"])["NonFiniteGuard"]["skipped"] == 1
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [m for m in messages if "left out (" in m] == [
        "step 3, source train: loss part distillation_alignment is not finite. The step is left "
        "out (optimizer.non_finite=skip), 1 so far."
    ]
    assert extract(run, tmp_path / "small")["largest_difference"] <= 1e-5


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize(("name", "kind"), [(WEIGHT, "weight"), (GATES, "gate")])
def test_skip_at_a_broken_gradient(
    name, kind, micro, tmp_path, train_tiny, break_gradient, load_state, assert_same, caplog
):
    break_gradient(name, 2, 3)
    sizes = (f"device_train_microbatch_size={micro}", "loss.distillation_similarity=0")
    with caplog.at_level(logging.WARNING):
        run = train_tiny(tmp_path, *EVERY, *sizes, SKIP)
    first, third = (load_state(run / f"ba{step}-rank0.pt") for step in (1, 3))
    assert_same(third["model"], first["model"])
    assert_same(third["optimizers"]["AdamW"]["state"], first["optimizers"]["AdamW"]["state"])
    assert metric(run, "numerics/skipped_steps") == [1, 2]
    assert f"step 2, source train: the gradient of {kind} {name} is not finite" in caplog.text


def test_a_broken_loss_whose_gradient_is_whole_is_left_out_too(
    tmp_path, train_tiny, monkeypatch, load_state, assert_same
):
    """In one microbatch of three, and not the last."""
    loss, calls = ComposerBGEM3.loss, []

    def broken(self, outputs, batch):
        parts = loss(self, outputs, batch)
        calls.append(1)
        if len(calls) == 4:  # the first of the second step
            parts["sts_regression"] = parts["sts_regression"].detach() * math.inf
        return parts

    monkeypatch.setattr(ComposerBGEM3, "loss", broken)
    sizes = ("device_train_microbatch_size=3", "loss.distillation_similarity=0")
    run = train_tiny(tmp_path, *EVERY, *sizes, SKIP)
    assert metric(run, "numerics/skipped_steps") == [1]
    states = [load_state(run / f"ba{step}-rank0.pt")["model"] for step in (1, 2)]
    assert_same(*states)


def test_ten_in_a_row_stop_the_run(tmp_path, train_tiny, break_loss):
    break_loss(*range(2, 99))
    message = (
        r"^step 11, source train: 10 steps in a row were left out, because losses or gradients are "
        r"not finite\. To fix, lower optimizer\.lr or look"
    )
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path, SKIP, "max_duration=20ba", *("eval_interval=20ba",))
    assert metric(tmp_path / "runs/tiny", "numerics/skipped_steps") == list(range(1, 11))


def test_without_anything_broken_skip_changes_nothing(
    tmp_path, train_tiny, load_state, assert_same
):
    runs = [
        train_tiny(tmp_path / mode, f"optimizer.non_finite={mode}") for mode in ("stop", "skip")
    ]
    for part in ("model", "optimizers"):
        assert_same(*(load_state(run)[part] for run in runs))


def test_a_resumed_run_goes_on_counting(tmp_path, train_tiny, break_loss):
    break_loss(2, 5)
    train_tiny(tmp_path, SKIP)
    run = train_tiny(tmp_path, SKIP, "max_duration=6ba", "autoresume=true")
    assert metric(run, "numerics/skipped_steps") == [1, 2]


def test_an_unknown_answer_is_refused(tiny_yaml):
    with pytest.raises(ConfigError, match=r"optimizer\.non_finite 'ignore' is not one of"):
        load_config([tiny_yaml], ["optimizer.non_finite=ignore"])


# All ranks alike


def test_a_loss_that_is_broken_on_another_rank_is_left_out_here_too(monkeypatch, caplog):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"name": "gates", "params": [parameter]}])
    model = nn.Module()
    model.gate = parameter
    loss = {"part": torch.tensor(1.0), "total": torch.tensor(1.0)}
    clock = SimpleNamespace(batch=SimpleNamespace(value=6))
    state = SimpleNamespace(
        model=model,
        optimizers=[optimizer],
        loss=loss,
        precision=Precision.FP32,
        timestamp=clock,
        batch={"source": "pairs"},
    )

    def other_rank(flags, reduce_operation):
        assert reduce_operation == "MAX"
        assert not flags.any()
        flags[0] = 1  # of the sorted parts of the loss

    monkeypatch.setattr(non_finite.dist, "all_reduce", other_rank)
    logged = SimpleNamespace(log_metrics=lambda _: None)
    guard = NonFiniteGuard(lambda *_: True, skip=True)
    for event in (Event.FIT_START, Event.AFTER_LOSS):
        guard.apply(event, state, logged)
    parameter.grad = torch.ones(2)
    with caplog.at_level(logging.WARNING):
        guard.apply(Event.AFTER_TRAIN_BATCH, state, logged)
    assert parameter.grad is None
    assert "step 7, source pairs: loss part part is not finite" in caplog.text


# Order and cost


def test_gradients_are_looked_at_before_they_are_clipped(tmp_path, train_tiny, monkeypatch):
    """Composer reverses the list after a backward pass."""
    seen = []
    for algorithm in (NonFiniteGuard, GroupGradientClipping):
        apply = algorithm.apply

        def record(self, event, state, logger, apply=apply):
            if event == Event.AFTER_TRAIN_BATCH:
                seen.append(type(self))
            apply(self, event, state, logger)

        monkeypatch.setattr(algorithm, "apply", record)
    train_tiny(tmp_path, "max_duration=1ba")
    assert seen == [NonFiniteGuard, GroupGradientClipping]


def test_in_half_precision_gradients_are_the_scalers_business():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), math.inf)
    guard = NonFiniteGuard(lambda *_: True)
    guard._watched = [non_finite.Watched("weight", "a", parameter)]
    guard._read_gradients(SimpleNamespace(precision=Precision.AMP_FP16), None)
    assert guard._gradients.broken() == []
    guard._read_gradients(SimpleNamespace(precision=Precision.FP32), None)
    assert len(guard._gradients.broken()) == 1


def test_the_table_names_what_is_logged():
    assert "``numerics/skipped_steps``" in NonFiniteGuard.__doc__


# Arithmetic


def test_norms():
    tensors = [
        torch.tensor([[4.0, -3.0]]),
        torch.tensor([math.nan, 5.0]),
        torch.tensor([-math.inf]),
        torch.tensor(2.0, dtype=torch.bfloat16),
    ]
    values = compute_norms([*tensors, torch.zeros(0)])
    expected = torch.tensor([5.0, math.nan, math.inf, 2.0, 0.0])
    torch.testing.assert_close(values, expected, equal_nan=True)
    assert compute_norms([]).shape == (0,)


def test_broken_is_what_adamw_could_not_square():
    limit = math.sqrt(torch.finfo(torch.float32).max)
    values = [limit * 0.99, limit * 1.01, math.nan, 0.0]
    watched = [non_finite.Watched("weight", str(n), None) for n in range(4)]
    reading = Reading(watched, [torch.tensor([v]) for v in values])
    assert [w.name for w, _ in reading.broken()] == ["1", "2"]


def test_the_order_is_that_of_a_backward_pass_with_gates_last():
    model = nn.Module()
    model.first, model.second = nn.Linear(1, 1), nn.Linear(1, 1)
    model.gate, model.multiplier, model.frozen = (nn.Parameter(torch.ones(1)) for _ in range(3))
    groups = [
        {"name": "multipliers/lambda_1", "params": [model.multiplier]},
        {"name": "gates", "params": [model.gate]},
        {"name": "weights/decay", "params": [model.first.weight, model.second.weight]},
        {"name": "weights/no_decay", "params": [model.first.bias, model.second.bias]},
    ]
    watched = watched_parameters(model, torch.optim.AdamW(groups))
    assert [(w.kind, w.name) for w in watched] == [
        ("weight", "second.bias"),
        ("weight", "second.weight"),
        ("weight", "first.bias"),
        ("weight", "first.weight"),
        ("gate", "gate"),
        ("multiplier", "multiplier"),
    ]


def test_descriptions():
    watched = non_finite.Watched("gate", "l0.head", None)
    assert describe("", [(watched, math.nan)]) == "gate l0.head is not finite (nan)"
    several = [(watched, math.inf), (watched, 1.0)]
    expected = "the gradient of gate l0.head is not finite (inf), and so is 1 other tensor"
    assert describe("gradient", several) == expected
    assert describe("gradient", []) == ""
    assert describe_losses(["total"]) == "loss part total is not finite"
    assert describe_losses(["a", "b", "total"]) == "loss parts a, b are not finite"
    assert describe_losses([]) == ""


RANKS = """
import math, os, sys
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.train import main

loss = ComposerBGEM3.loss

def broken(self, outputs, batch):
    parts = loss(self, outputs, batch)
    if self.l0_module.step + 1 == 2 and os.environ["RANK"] == "1":
        parts["sts_regression"] = parts["sts_regression"].detach() * math.inf
    return parts

ComposerBGEM3.loss = broken
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_leave_out_the_same_step(tmp_path, make_yaml, load_state, assert_same):
    """Its loss is broken on one of them, and no gradient is."""
    script = tmp_path / "broken.py"
    script.write_text(RANKS)
    launcher = [str(Path(sys.executable).with_name("composer")), "-n", "2", str(script)]
    settings = ("loss.distillation_similarity=0", "max_duration=3ba")
    done = subprocess.run(
        [*launcher, str(make_yaml(tmp_path)), *EVERY, *settings, SKIP],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2, source train: loss part sts_regression is not finite" in done.stderr
    run = tmp_path / "runs" / "tiny"
    first, second, third = (load_state(run / f"ba{n}-rank0.pt")["model"] for n in (1, 2, 3))
    assert_same(first, second)
    assert not torch.equal(third[WEIGHT], second[WEIGHT])
    assert all(v.isfinite().all() for v in third.values() if v.is_floating_point())
