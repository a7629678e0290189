"""The line that a person follows."""

import pytest

from bge_pruning.callbacks.progress_log import render_line, render_time

LOSSES = {
    "loss/train/total": 0.01234,
    "loss/train/distillation_alignment": 0.0101,
    "loss/train/lagrangian": 0.0,
}


def constraint(axis: str, expected: float, target: float) -> dict[str, float]:
    return {
        f"pruning/expected_sparsity/{axis}": expected,
        f"pruning/target_sparsity/{axis}": target,
    }


def test_a_budget():
    metrics = {
        **LOSSES,
        **constraint("encoder", 0.31, 0.35),
        "data/texts_per_second": 210.4,
        "data/loss/only": 0.3,
    }
    assert render_line(150, 600, metrics, {"encoder": 0.5}, 1.2e-4, 180.0) == (
        "step 150/600  loss 0.0123 (alignment 0.010, lagrangian 0.000)  "
        "sparsity 0.310 of 0.350 (target 0.500)  210 texts/s  lr 1.2e-04  left 3 min"
    )


def test_after_the_warm_up_the_target_is_said_once():
    line = render_line(1, 2, {**LOSSES, **constraint("encoder", 0.49, 0.5)}, {"encoder": 0.5}, 0, 0)
    assert "sparsity 0.490 of 0.500  lr" in line


def test_a_shape():
    metrics = {**LOSSES, **constraint("head", 0.1, 0.2), **constraint("intermediate", 0.3, 0.4)}
    line = render_line(1, 2, metrics, {"head": 0.5, "intermediate": 0.5}, 0, 0)
    assert "  sparsity heads 0.100 of 0.200, units 0.300 of 0.400  " in line


def test_without_gates_and_with_one_loss():
    line = render_line(7, 8, {"loss/train/total": 0.5}, {}, 1e-3, 30)
    assert line == "step 7/8  loss 0.5000  lr 1.0e-03  left 30 s"


def test_several_sources_and_steps_left_out():
    more = {"data/loss/b": 0.25, "data/loss/a": 0.5, "numerics/skipped_steps": 3}
    line = render_line(7, 8, {**LOSSES, **more}, {}, 1e-3, 30)
    assert "  by source a 0.500, b 0.250  lr 1.0e-03  skipped 3  left 30 s" in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (99.0, "99 s"),
        (100.0, "2 min"),
        (5900.0, "98 min"),
        (6000.0, "1 h 40 min"),
        (7500.0, "2 h 05 min"),
        (180_000.0, "50 h 00 min"),
    ],
)
def test_times(seconds, text):
    assert render_time(seconds) == text


def test_a_constraint_that_nobody_logs_is_left_out():
    assert "sparsity" not in render_line(1, 2, LOSSES, {"head": 0.5}, 0, 0)
