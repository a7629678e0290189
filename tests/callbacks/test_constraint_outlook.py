"""Collapse, divergence and reach from made-up courses of a constraint."""

import pytest

from bge_pruning.callbacks.pruning_warnings import (
    Reading,
    diverges,
    gathers_speed,
    has_collapsed,
    is_huge,
    misses,
    project,
    runs_ahead,
    swings,
)


def course(sparsities, multipliers, target=0.5, every=10) -> list[Reading]:
    pairs = zip(sparsities, multipliers, strict=True)
    return [
        Reading((n + 1) * every, sparsity, target, multiplier, abs(sparsity - target))
        for n, (sparsity, multiplier) in enumerate(pairs)
    ]


@pytest.mark.parametrize(
    ("density", "final", "expected"),
    [
        (0.41, 0.2, False),  # 0.8 are to stay
        (0.39, 0.2, True),
        (0.25, 0.5, False),
        (0.24, 0.5, True),
        (0.03, None, False),
        (0.01, None, True),
    ],
)
def test_collapse(density, final, expected):
    assert has_collapsed(density, final) is expected


@pytest.mark.parametrize(
    ("expected", "start", "ahead"),
    [
        (0.19, 0.0, False),
        (0.21, 0.0, True),
        (0.01, 0.0, False),
        (0.21, 0.15, False),  # hardly more than at the start
        (0.26, 0.15, True),
        (0.3, 0.5, False),  # less: they open
    ],
)
def test_haste(expected, start, ahead):
    assert runs_ahead(Reading(1, expected, 0.1, 1.0, 0.1), start) is ahead


@pytest.mark.parametrize(
    ("multiplier", "gap", "expected"), [(101, 0.1, True), (99, 0.1, False), (1e6, 0.01, False)]
)
def test_a_huge_multiplier_matters_while_the_constraint_is_not_met(multiplier, gap, expected):
    assert is_huge(Reading(1, 0.5, 0.5, multiplier, gap)) is expected


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
    ("sparsities", "expected"),
    [
        ([0.1, 0.101, 0.105], True),
        ([0.1, 0.102, 0.104], False),  # evenly
        ([0.1, 0.1001, 0.1003], False),  # it hardly moves
        ([0.1, 0.09, 0.08], False),  # away from the target
        ([0.9, 0.899, 0.89], True),
        ([0.1, 0.2], False),  # too few to tell
    ],
)
def test_gathering_speed(sparsities, expected):
    assert gathers_speed(course(sparsities, [1] * len(sparsities))) is expected


def test_swinging():
    assert swings(course([0.4, 0.6], [1, 1]))
    assert not swings(course([0.4, 0.45], [1, 1]))


def test_projection_is_linear_and_stays_a_share():
    readings = course([0.10, 0.11, 0.12], [1, 1, 1], every=10)  # to step 30, 0.01 in ten steps
    assert project(readings, 30) == pytest.approx(0.12)
    assert project(readings, 130) == pytest.approx(0.22)
    assert project(readings, 10_000) == 1.0
    assert project(course([0.3, 0.1], [1, 1]), 1_000) == 0.0


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
