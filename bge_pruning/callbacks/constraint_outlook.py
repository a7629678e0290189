"""What the course of a sparsity constraint says about its end: pure arithmetic on readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of the size that is to stay: less than this share of it is a collapse.
COLLAPSED = 0.5
# Of an axis without a target of its own (a budget is on the whole): nearly nothing is open.
NEARLY_NOTHING = 0.02
# Sparsity: as far beyond the target of the moment, gates have not waited for the warm-up.
AHEAD = 0.1
# Sparsity: nearer to the target than this is near enough for a warning to be none.
NEAR = 0.02
# Sparsity: a gap below this is not called diverging, however slowly it closes.
WIDE = 0.05
# A gap that is this share of what it was has not closed.
NOT_CLOSING = 0.95
# Multipliers that grow by this factor over the window, as the gap stays, push in vain.
GROWS = 1.05
# Sparsity: less than this is no movement; and a speed that grew by this factor still grows.
MOVED = 0.002
FASTER = 1.5
# The task's loss is of order 1: with such a multiplier the gates no longer hear it.
HUGE = 100.0


@dataclass(frozen=True)
class Reading:
    """A constraint after a step.

    Attributes:
        step: Steps so far.
        expected: Expected sparsity, mean over layers.
        target: Target sparsity at this point of the warm-up.
        multiplier: Largest absolute ``lambda_1`` of a layer.
        gap: Largest distance of a layer from ``target``; at least that of ``expected``.
    """

    step: int
    expected: float
    target: float
    multiplier: float
    gap: float


def has_collapsed(density: float, final_target: float | None) -> bool:
    """Whether far less is open than is to stay.

    Args:
        density: Expected share that is open.
        final_target: Sparsity after the warm-up; ``None`` for an axis without a target.
    """
    limit = NEARLY_NOTHING if final_target is None else COLLAPSED * (1.0 - final_target)
    return density < limit


def runs_ahead(reading: Reading, start: float) -> bool:
    """Whether far more was closed by training than the warm-up asks for at this point.

    Args:
        reading: The last one.
        start: Expected sparsity before the first step: a wide spread (``l0_module.init_std``)
            closes some gates of a small axis that open again.
    """
    return reading.expected - max(reading.target, start) > AHEAD


def is_huge(reading: Reading) -> bool:
    """Whether a multiplier drowns the task while the constraint is not met."""
    return reading.multiplier > HUGE and reading.gap > NEAR


def gathers_speed(readings: Sequence[Reading]) -> bool:
    """Whether the gates have begun to follow: they went to the target, faster in the second half.

    Multipliers push longer and longer before gates that are wide open move at all.

    Args:
        readings: Of a window with a fixed target, two or more, in order.
    """
    middle, last = readings[len(readings) // 2], readings[-1]
    if last.step == middle.step:
        return False
    way = 1.0 if last.target > last.expected else -1.0
    moved = way * (last.expected - middle.expected)
    before = way * (middle.expected - readings[0].expected) / (middle.step - readings[0].step)
    return moved > MOVED and moved / (last.step - middle.step) > FASTER * before


def diverges(readings: Sequence[Reading]) -> bool:
    """Whether the multipliers grow while the gap does not close.

    Gaps are compared by the worst of each half: one that swings through 0 is not closed.

    Args:
        readings: Of a window with a fixed target, two or more, in order.
    """
    half = len(readings) // 2
    before, after = (max(r.gap for r in part) for part in (readings[:half], readings[half:]))
    grown = readings[-1].multiplier > GROWS * readings[0].multiplier
    stays = after > WIDE and after >= NOT_CLOSING * before
    return grown and stays and not gathers_speed(readings)


def swings(readings: Sequence[Reading]) -> bool:
    """Whether the mean of the layers was on both sides of the target."""
    gaps = [r.expected - r.target for r in readings]
    return min(gaps) < 0.0 < max(gaps)


def project(readings: Sequence[Reading], end: int) -> float:
    """Expected sparsity at the end at the mean speed of a window, in [0, 1].

    Args:
        readings: Two or more, in order, of different steps.
        end: Step at which the run ends.
    """
    first, last = readings[0], readings[-1]
    speed = (last.expected - first.expected) / (last.step - first.step)
    return min(1.0, max(0.0, last.expected + speed * (end - last.step)))


def misses(readings: Sequence[Reading], end: int) -> bool:
    """Whether the target will not be reached at the speed of a window with a fixed target."""
    last = readings[-1]
    now, then = last.expected - last.target, project(readings, end) - last.target
    # On the other side of the target, it would have been passed; so it was if the course swings.
    passed = now * then < 0.0 or swings(readings)
    return abs(now) > NEAR and abs(then) > NEAR and not passed and not gathers_speed(readings)
