"""Warnings about gates and constraint: once, early, with numbers and the knob; no false alarm."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bge_pruning.callbacks import pruning_warnings
from bge_pruning.callbacks.pruning_warnings import (
    PruningWarnings,
    Reading,
    diverges,
    has_collapsed,
    is_huge,
    misses,
)
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module

SHAPE = EncoderShape(32, 4, 4, 64, 99, head_dim=8, max_position_embeddings=80)
HALF = replace(SHAPE, hidden_size=16, num_attention_heads=2, intermediate_size=32)
KNOBS = {"l0_lr": 0.1, "lagrangian_lr": 0.02}
END = 200


@pytest.fixture
def gates() -> L0Module:
    module = L0Module(SHAPE, ("head", "hidden", "intermediate"), HALF, init_std=0.0)
    module.warmup_progress = 1.0
    return module


@pytest.fixture
def said(monkeypatch) -> list[str]:
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(pruning_warnings.log, "handlers", [handler])
    return messages


def set_sparsity(gates: L0Module, axis: str, sparsity: float, layer: int | None = None) -> None:
    """Gates that are all as open as the expected sparsity says."""
    log_alpha = math.log((1 - sparsity) / sparsity) + 2 / 3 * math.log(0.1 / 1.1)
    values = gates.log_alpha[axis].data
    (values if layer is None else values[layer]).fill_(log_alpha)


def at(step: int, end: int = END) -> SimpleNamespace:
    from composer.core import Time, Timestamp

    return SimpleNamespace(timestamp=Timestamp(batch=step), max_duration=Time(end, "ba"))


def meet(gates: L0Module) -> None:
    for axis in gates.axes:
        set_sparsity(gates, axis, 0.5)


def test_a_constraint_that_is_met_gives_no_warning_and_looking_changes_nothing(gates, said):
    meet(gates)
    random = torch.random.get_rng_state()
    watch = PruningWarnings(gates, KNOBS)
    for step in range(2, END + 1, 2):
        for multiplier in gates.lambda_1.values():
            multiplier.data += 1.0
        before = {k: v.clone() for k, v in gates.state_dict().items()}
        watch.batch_end(at(step), None)
        assert all(torch.equal(v, before[k]) for k, v in gates.state_dict().items())
    assert said == []
    assert all(p.grad is None for p in gates.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


def test_collapse_of_an_axis_before_it_is_asked_for(gates, said, monkeypatch):
    meet(gates)
    gates.warmup_progress = 0.1
    watch = PruningWarnings(gates, KNOBS)
    set_sparsity(gates, "hidden", 0.8)
    with monkeypatch.context() as patch:  # other ranks leave it to the first
        patch.setattr(pruning_warnings.dist, "get_global_rank", lambda: 1)
        watch.batch_end(at(2), None)
    assert said == []
    for step in (2, 4, 6):
        watch.batch_end(at(step), None)
    assert said == [
        "step 2: the gates close too far: of hidden 20.0% are expected to stay open; 95.0% are "
        "asked for now, 50.0% in the end. To fix, lower optimizer.l0_lr (now 0.1) or "
        "optimizer.lagrangian_lr (now 0.02)."
    ]


def test_collapse_of_a_layer_and_of_another_axis_later(gates, said):
    meet(gates)
    watch = PruningWarnings(gates, KNOBS)
    set_sparsity(gates, "head", 0.9, layer=2)
    watch.batch_end(at(2), None)
    set_sparsity(gates, "intermediate", 0.99)
    watch.batch_end(at(4), None)
    first, second = [message for message in said if "close too far" in message]
    assert "of head of layer 2 10.0% are expected to stay open" in first
    assert "of intermediate of layer 0 1.0% are" in second
    assert "head" not in second


def test_with_a_budget_layers_may_lose_all_heads_and_an_axis_may_not(said):
    gates = L0Module(SHAPE, ("head", "hidden"), None, 20_000, init_std=0.0)
    gates.warmup_progress = 1.0
    for axis in gates.axes:
        set_sparsity(gates, axis, 0.3)
    set_sparsity(gates, "head", 0.999, layer=1)
    watch = PruningWarnings(gates, KNOBS)
    watch.batch_end(at(2), None)
    assert said == []
    set_sparsity(gates, "head", 0.999)
    watch.batch_end(at(4), None)
    message = next(message for message in said if "close too far" in message)
    assert "of head 0.1% are expected to stay open" in message


def run(watch: PruningWarnings, gates: L0Module, sparsity, multiplier=lambda step: 1.0) -> None:
    """A run whose hidden axis has a sparsity and a multiplier at each step."""
    meet(gates)
    for step in range(2, END + 1, 2):
        set_sparsity(gates, "hidden", sparsity(step))
        gates.lambda_1["hidden"].data.fill_(multiplier(step))
        watch.batch_end(at(step), None)


def test_a_target_out_of_reach(gates, said):
    run(PruningWarnings(gates, KNOBS), gates, lambda step: 0.1 + 0.0005 * step)
    assert said == [
        "step 60: at the present speed the target is missed when the run ends: hidden is at "
        "sparsity 0.130, the target is 0.500, and will be at 0.200 at step 200. To fix, raise "
        "optimizer.l0_lr (now 0.1) or optimizer.lagrangian_lr (now 0.02), or train longer "
        "(max_duration)."
    ]


@pytest.mark.parametrize(("warm", "speed"), [(1.0, 0.003), (0.9, 0.0)])
def test_what_is_on_its_way_or_has_a_target_that_moves_is_in_reach(warm, speed, gates, said):
    gates.warmup_progress = warm
    run(PruningWarnings(gates, KNOBS), gates, lambda step: min(0.5, 0.1 * warm + speed * step))
    assert said == []


def test_after_a_huge_multiplier_its_axis_gets_no_other_advice(gates, said):
    run(PruningWarnings(gates, KNOBS), gates, lambda step: 0.1, lambda step: -10.0 * step)
    (message,) = said
    what = "step 12: the multipliers grow and the gap does not close: hidden gap 0.400"
    assert message.startswith(f"{what}, lambda_1 120.")


def test_multipliers_in_vain(gates, said):
    slow = lambda step: 0.1  # noqa: E731
    run(PruningWarnings(gates, {**KNOBS, "l0_lr": 1e-6}), gates, slow, lambda s: -0.1 * s)
    assert said == [
        "step 60: the multipliers grow and the gap does not close: hidden gap 0.400 (20 steps "
        "ago 0.400), lambda_1 6 (4). To fix, lower optimizer.lagrangian_lr (now 0.02), or raise "
        "optimizer.l0_lr (now 1e-06) if the gates hardly move."
    ]


def test_a_multiplier_that_drowns_the_task_is_told_at_any_time(gates, said):
    for axis in gates.axes:
        set_sparsity(gates, axis, 0.01)
    gates.warmup_progress = 0.1
    gates.lambda_1["hidden"].data.fill_(-300.0)
    watch = PruningWarnings(gates, {**KNOBS, "lagrangian_lr": 100.0})
    for step in (2, 4):
        watch.batch_end(at(step), None)
    assert said == [
        "step 2: the multipliers grow and the gap does not close: hidden gap 0.040, lambda_1 300. "
        "To fix, lower optimizer.lagrangian_lr (now 100), or raise optimizer.l0_lr (now 0.1) if "
        "the gates hardly move."
    ]


def test_it_looks_a_hundred_times(gates, monkeypatch):
    looks = []
    monkeypatch.setattr(PruningWarnings, "_look", lambda self, step, _: looks.append(step) or [])
    watch = PruningWarnings(gates, KNOBS)
    for step in range(1, 15_001):
        watch.batch_end(at(step, 15_000), None)
    assert looks == list(range(150, 15_001, 150))


def test_a_short_run_is_too_short_to_judge(tmp_path, train_tiny, said):
    train_tiny(tmp_path, "max_duration=8ba")
    assert said == []


def course(sparsities, multipliers, target=0.5, every=10) -> list[Reading]:
    pairs = zip(sparsities, multipliers, strict=True)
    return [
        Reading((n + 1) * every, sparsity, target, multiplier, abs(sparsity - target))
        for n, (sparsity, multiplier) in enumerate(pairs)
    ]


def test_collapse_and_a_huge_multiplier_while_the_constraint_is_not_met():
    limits = {0.2: 0.4, 0.5: 0.25, None: 0.02}  # by sparsity: 0.8, 0.5, or an unknown share stays
    for final, limit in limits.items():
        assert has_collapsed(limit - 0.001, final) and not has_collapsed(limit + 0.001, final)
    huge = {(101, 0.1): True, (99, 0.1): False, (1e6, 0.01): False}  # by multiplier and gap
    assert {pair: is_huge(Reading(1, 0.5, 0.5, *pair)) for pair in huge} == huge


@pytest.mark.parametrize(
    ("sparsities", "multipliers", "expected"),
    [
        ([0.1, 0.1, 0.1, 0.1], [1.0, 1.1, 1.2, 1.3], True),  # nothing moves
        ([0.1, 0.15, 0.2, 0.25], [1.0, 1.1, 1.2, 1.3], False),  # it closes
        ([0.1, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0], False),  # nobody pushes
        ([0.46, 0.46, 0.46, 0.46], [1.0, 1.1, 1.2, 1.3], False),  # near enough
        ([0.1, 0.9, 0.1, 0.9], [10.0, 20.0, 10.0, 30.0], True),  # it swings
        ([0.10, 0.10, 0.101, 0.105], [1.0, 1.1, 1.2, 1.3], False),  # it gathers speed
        ([0.2, 0.8, 0.35, 0.6], [10.0, 20.0, 10.0, 30.0], False),  # less and less
    ],
)
def test_divergence(sparsities, multipliers, expected):
    assert diverges(course(sparsities, multipliers)) is expected


@pytest.mark.parametrize(
    ("sparsities", "end", "expected"),
    [
        ([0.10, 0.11, 0.12], 130, True),
        ([0.10, 0.11, 0.12], 500, False),
        ([0.49, 0.49, 0.49], 130, False),  # near enough
        ([0.10, 0.05, 0.02], 130, True),  # it goes the wrong way
        ([0.80, 0.79, 0.78], 130, True),  # too much is pruned
        ([0.80, 0.70, 0.60], 130, False),
        ([0.40, 0.60, 0.60], 31, False),  # it swings: another warning
        ([0.10, 0.101, 0.105], 130, False),  # it gathers speed
        ([0.90, 0.899, 0.895], 130, False),
        ([0.60, 0.55, 0.53], 130, False),  # on its way through the target
    ],
)
def test_reach(sparsities, end, expected):
    assert misses(course(sparsities, [1, 1, 1]), end) is expected
