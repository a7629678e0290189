"""Numbers that are not finite: found in their step, by name; the run stops or skips the step."""

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
from bge_pruning.export.extract import extract
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.training import builders
from tests.common.trainings import logged

ROOT = Path(__file__).parents[2]
SKIP = "optimizer.non_finite=skip"
EVERY = ("save_interval=1ba", "checkpoints_to_keep=9")
WEIGHT = "backbone.encoder.layer.2.output.dense.weight"
GATES = "l0_module.log_alpha.head"
NEWEST = "runs/tiny/latest-rank0.pt"
ADVICE = {
    "weight": r"lower optimizer\.lr or look for broken texts in that source",
    "gate": r"lower optimizer\.l0_lr",
    "multiplier": r"lower optimizer\.lagrangian_lr and optimizer\.lambda_2_lr",
}
NAMES = [("first.weight", "weight"), ("gate", "gate"), ("multiplier", "multiplier")]
OR_SKIP = r", or skip such steps with optimizer\.non_finite=skip"
KEPT = r"\. The last checkpoint is kept, and autoresume=true resumes from it\.$"


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """Messages reach caplog, whatever a test before has set up."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)


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


class Tiny(nn.Module):
    """Two layers, a gate and a multiplier; their gradients are 1."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        self.gate, self.multiplier = (nn.Parameter(torch.ones(2)) for _ in range(2))
        groups = [
            {"name": "multipliers/lambda_1", "params": [self.multiplier]},
            {"name": "gates", "params": [self.gate]},
            {"name": "weights/decay", "params": [self.first.weight, self.second.weight]},
            {"name": "weights/no_decay", "params": [self.first.bias, self.second.bias]},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        self.steps = 0

    def start(self, **settings) -> non_finite.NonFiniteGuard:
        guard = non_finite.NonFiniteGuard(lambda *_: True, **settings)
        guard.apply(Event.FIT_START, self._state(), None)
        return guard

    def step(self, guard, loss=None, gradients=None, tensors=None, logged=None):
        """Take a step with a given loss, and with a number in some gradients and tensors."""
        parts = {"part": torch.tensor(1.0), "total": torch.tensor(1.0)}
        parts |= {name: torch.tensor(v) for name, v in (loss or {}).items()}
        state = self._state(parts)
        if guard.match(Event.AFTER_LOSS, state):
            guard.apply(Event.AFTER_LOSS, state, None)
        for name, parameter in self.named_parameters():
            parameter.grad = torch.ones_like(parameter)
            if name in (gradients or {}):
                parameter.grad.view(-1)[-1] = gradients[name]
        logger = SimpleNamespace(log_metrics=(logged if logged is not None else []).append)
        guard.apply(Event.AFTER_TRAIN_BATCH, state, logger)
        self.optimizer.step()
        for name, value in (tensors or {}).items():
            self.get_parameter(name).data.view(-1)[0] = value
        self.steps += 1
        for event in (Event.BATCH_END, Event.BATCH_CHECKPOINT):
            guard.apply(event, self._state(parts), logger)

    def _state(self, parts=None) -> SimpleNamespace:
        return SimpleNamespace(
            model=self,
            optimizers=[self.optimizer],
            loss=parts,
            total_loss_dict={f"loss/train/{n}": float(v) for n, v in (parts or {}).items()},
            precision=Precision.FP32,
            timestamp=SimpleNamespace(batch=SimpleNamespace(value=self.steps)),
            batch={"source": "pairs"},
        )


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_loss_stops_the_run(value, tiny):
    guard = tiny.start()
    tiny.step(guard)
    message = r"^step 2, source pairs: loss part part is not finite\. To fix, "
    with pytest.raises(RuntimeError, match=message + ADVICE["weight"] + OR_SKIP + KEPT):
        tiny.step(guard, loss={"part": value, "total": value})


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_a_broken_gradient_with_a_whole_loss_stops_the_run(name, kind, tiny):
    start = rf"^step 1, .*: the gradient of {kind} {name} is "
    end = r"\. To fix, " + ADVICE[kind] + OR_SKIP + KEPT
    with pytest.raises(RuntimeError, match=start + r"not finite \(nan\)" + end):
        tiny.step(tiny.start(), gradients={name: math.nan})
    other = Tiny()  # the square of its gradient overflows
    with pytest.raises(RuntimeError, match=start + r"too large for AdamW \(1e\+25\)"):
        other.step(other.start(), gradients={name: 1e25})


@pytest.mark.parametrize(("name", "kind"), NAMES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_tensor_broken_by_the_step_stops_the_run_whatever_the_mode(skip, name, kind, tiny):
    message = rf"^step 1, .*: {kind} {name} is not finite \(nan\)\. To fix, {ADVICE[kind]}{KEPT}"
    with pytest.raises(RuntimeError, match=message):
        tiny.step(tiny.start(skip=skip), tensors={name: math.nan})


@pytest.mark.parametrize(("kind", "name"), [("weight", WEIGHT), ("gate", GATES)])
def test_a_tensor_broken_by_a_step_stops_it(kind, name, tmp_path, train_tiny, with_optimizer):
    def look(model, optimizer):
        def spoil(*_: object) -> None:
            if model.l0_module.step + 1 == 3:
                dict(model.named_parameters())[name].data.view(-1)[0] = math.nan

        optimizer.register_step_post_hook(spoil)

    with_optimizer(look)
    message = rf"^step 3, source train: {kind} {name} is not finite \(nan\)\. To fix, lower"
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path, *EVERY)
    assert (tmp_path / NEWEST).resolve().name == "ba2-rank0.pt"


def test_the_run_resumes_from_the_checkpoint_before(
    tmp_path, train_tiny, break_gradient, monkeypatch, load_state, assert_same
):
    whole = train_tiny(tmp_path / "whole", *EVERY)
    with monkeypatch.context():
        break_gradient(WEIGHT, 3, value=math.inf)
        message = rf"^step 3, .*: the gradient of weight {WEIGHT} is not finite \(inf\)"
        with pytest.raises(RuntimeError, match=message):
            train_tiny(tmp_path / "parts", *EVERY)
    monkeypatch.undo()
    stopped = tmp_path / "parts" / "runs" / "tiny"
    assert (tmp_path / "parts" / NEWEST).resolve().name == "ba2-rank0.pt"
    before = load_state(whole / "ba2-rank0.pt"), load_state(stopped / "ba2-rank0.pt")
    assert_same(before[1]["model"], before[0]["model"])
    resumed = train_tiny(tmp_path / "parts", *EVERY, "autoresume=true")
    for part in ("model", "optimizers"):
        assert_same(load_state(resumed)[part], load_state(whole)[part], where=part)


def test_a_broken_operation_is_named_before_what_it_spoils(tmp_path, train_tiny, with_optimizer):
    """In layer 2 of 4 the backward pass breaks: layers 0 to 2 inherit it, layer 3 does not."""

    def look(model, _):
        def spoil(module, inputs, output):
            if model.training:
                output.register_hook(lambda gradient: gradient * math.nan)

        model.backbone.encoder.layer[2].attention.self.register_forward_hook(spoil)

    with_optimizer(look)
    message = (
        r"the gradient of weight backbone\.encoder\.layer\.2\.attention\.self\.value\.bias is "
        r"not finite \(nan\), and so are \d\d other tensors"
    )
    with pytest.raises(RuntimeError, match=message):
        train_tiny(tmp_path, "max_duration=1ba")


@pytest.mark.parametrize(("name", "kind"), NAMES)
def test_skip_at_a_broken_gradient(name, kind, tiny, caplog):
    guard, logged = tiny.start(skip=True), []
    tiny.step(guard, logged=logged)
    before = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    moments = [{k: v.clone() for k, v in s.items()} for s in tiny.optimizer.state.values()]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tiny.step(guard, gradients={name: math.nan}, logged=logged)
    assert all(torch.equal(p, before[n]) for n, p in tiny.named_parameters())
    for kept, state in zip(moments, tiny.optimizer.state.values(), strict=True):
        assert all(torch.equal(state[k], v) for k, v in kept.items())
    assert logged == [{"numerics/skipped_steps": 1}, {"numerics/skipped_steps": 2}]
    assert (
        f"step 2, source pairs: the gradient of {kind} {name} is not finite (nan). The step is "
        "skipped (optimizer.non_finite=skip), 1 so far." in caplog.text
    )
    tiny.step(guard)
    assert guard.in_a_row == 0 and not torch.equal(tiny.gate, before["gate"])


def test_ten_in_a_row_stop_the_run_and_a_resumed_one_resumes_the_count(tiny):
    guard, logged = tiny.start(skip=True), []
    tiny.step(guard, logged=logged)
    message = (
        r"^step 11, source pairs: 10 steps in a row were skipped, because losses or gradients are "
        rf"not finite\. To fix, {ADVICE['weight']}{KEPT}"
    )
    for _ in range(9):
        tiny.step(guard, loss={"part": math.nan}, logged=logged)
    resumed = tiny.start(skip=True)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(RuntimeError, match=message):
        tiny.step(guard, loss={"part": math.nan}, logged=logged)
    tiny.step(resumed, loss={"part": math.nan}, logged=logged)
    assert [row["numerics/skipped_steps"] for row in logged] == [*range(1, 11), 10]


def test_microbatches_are_skipped_together(
    tmp_path, train_tiny, monkeypatch, break_gradient, load_state, assert_same
):
    """A gradient breaks in step 2; a loss whose gradient is whole in the first third of step 3."""
    loss, calls = ComposerBGEM3.loss, []

    def broken(self, outputs, batch):
        parts = loss(self, outputs, batch)
        calls.append(1)
        if len(calls) == 7:  # the first of the third step
            parts["sts_regression"] = parts["sts_regression"].detach() * math.inf
        return parts

    monkeypatch.setattr(ComposerBGEM3, "loss", broken)
    break_gradient(GATES, 2)
    sizes = ("device_train_microbatch_size=3", "loss.distillation_similarity=0")
    run = train_tiny(tmp_path, *EVERY, *sizes, SKIP)
    assert extract(run, tmp_path / "small").largest_difference <= 1e-5
    assert [*logged(run, "numerics/skipped_steps").values()] == [1, 2]
    first, third, last = (load_state(run / f"ba{step}-rank0.pt") for step in (1, 3, 4))
    assert_same(third["model"], first["model"])
    assert_same(third["optimizers"]["AdamW"]["state"], first["optimizers"]["AdamW"]["state"])
    assert not torch.equal(last["model"][WEIGHT], third["model"][WEIGHT])
    assert all(v.isfinite().all() for v in last["model"].values() if v.is_floating_point())
    assert dict(last["algorithms"])["NonFiniteGuard"]["skipped"] == 2


def test_without_anything_broken_skip_changes_nothing(
    tmp_path, train_tiny, load_state, assert_same, monkeypatch
):
    """And gradients are checked before they are clipped: Composer reverses the list."""
    seen = []
    for algorithm in (non_finite.NonFiniteGuard, GroupGradientClipping):
        apply = algorithm.apply

        def record(self, event, state, logger, apply=apply):
            if event == Event.AFTER_TRAIN_BATCH:
                seen.append(type(self))
            apply(self, event, state, logger)

        monkeypatch.setattr(algorithm, "apply", record)
    settings = ("max_duration=2ba", "save_interval=2ba")
    stop, skip = (
        train_tiny(tmp_path / mode, *settings, f"optimizer.non_finite={mode}")
        for mode in ("stop", "skip")
    )
    for part in ("model", "optimizers"):
        assert_same(load_state(stop)[part], load_state(skip)[part])
    assert seen == [non_finite.NonFiniteGuard, GroupGradientClipping] * 4


@pytest.mark.parametrize(
    ("place", "what"), [(0, "loss part part is"), (2, "the gradient of weight second.bias is")]
)
def test_what_is_broken_on_another_rank_is_skipped_here_too(place, what, tiny, monkeypatch, caplog):
    def other_rank(flags, reduce_operation):
        assert reduce_operation == "MAX"
        assert not flags.any()
        flags[place] = 1  # the sorted parts of the loss, then the gradients

    monkeypatch.setattr(non_finite.dist, "all_reduce", other_rank)
    with caplog.at_level(logging.WARNING):
        tiny.step(tiny.start(skip=True))
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert f"step 1, source pairs: {what} not finite" in caplog.text


def test_in_half_precision_gradients_are_the_scalers_business(tiny):
    guard = tiny.start()
    tiny.gate.grad = torch.full((2,), math.inf)
    for precision, count in ((Precision.AMP_FP16, 0), (Precision.FP32, 1)):
        guard._measure_gradients(SimpleNamespace(precision=precision))
        assert len(guard.gradient_norms()) == len(guard._broken_gradients()) == count


def test_norms_and_broken_is_what_adamw_could_not_square():
    limit = math.sqrt(torch.finfo(torch.float32).max)
    values = [[4.0, -3.0], [math.nan, 5.0], [-math.inf], [2.0], [], [limit * 0.99], [limit * 1.01]]
    tensors = [torch.tensor(value) for value in values]
    tensors[3] = tensors[3].bfloat16()
    norms = non_finite.compute_norms(tensors)
    expected = torch.tensor([5.0, math.nan, math.inf, 2.0, 0.0, limit * 0.99, limit * 1.01])
    torch.testing.assert_close(norms, expected, equal_nan=True)
    assert non_finite.compute_norms([]).shape == (0,)
    watched = [non_finite.Watched("weight", str(n), None) for n in range(len(values))]
    assert [w.name for w, _ in non_finite.find_broken(watched, tensors, norms)] == ["1", "2", "6"]


def test_the_order_is_that_of_a_backward_pass_with_gates_last(tiny):
    tiny.frozen = nn.Parameter(torch.ones(1))
    assert [(w.kind, w.name) for w in non_finite.watched_parameters(tiny, tiny.optimizer)] == [
        ("weight", "second.bias"),
        ("weight", "second.weight"),
        ("weight", "first.bias"),
        ("weight", "first.weight"),
        ("gate", "gate"),
        ("multiplier", "multiplier"),
    ]


def test_descriptions():
    watched = non_finite.Watched("gate", "l0.head", None)
    assert non_finite.describe("", [(watched, math.nan)]) == "gate l0.head is not finite (nan)"
    several = [(watched, math.inf), (watched, 1.0)]
    expected = "the gradient of gate l0.head is not finite (inf), and so is 1 other tensor"
    assert non_finite.describe("gradient", several) == expected
    assert non_finite.describe_losses(["total"]) == "loss part total is not finite"
    assert non_finite.describe_losses(["a", "b", "total"]) == "loss parts a, b are not finite"
    assert non_finite.describe_losses([]) == ""


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


@pytest.mark.slow
def test_two_ranks_skip_the_same_step(tmp_path, make_yaml, load_state, assert_same):
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
