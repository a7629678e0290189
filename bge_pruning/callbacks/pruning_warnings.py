"""Warns early when gates collapse, multipliers diverge, or the target cannot be reached."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from bge_pruning.models.l0_module_embedding import Constraint, L0Module
from bge_pruning.utils.clock import count_batches

log = logging.getLogger(__name__)

# Looks per run, and what a judgement of a course needs: a share of the run, and steps.
LOOKS = 100
WINDOW_SHARE, WINDOW_STEPS = 0.1, 10
# Multipliers begin at 0 and need some time to move anything.
FIRST_SHARE = 0.3
# A collapse leaves less than this share of the size that is to stay, or of an axis without a
# target of its own (a budget is on the whole).
COLLAPSED, NEARLY_NOTHING = 0.5, 0.02
# Sparsity: a gap below NEAR is met, one below WIDE is not called diverging however slowly it
# closes, and less than MOVED is no movement.
NEAR, WIDE, MOVED = 0.02, 0.05, 0.002
# A gap that is this share of what it was has not closed; multipliers that grow by this factor
# meanwhile push in vain; a speed that grew by this factor still grows.
NOT_CLOSING, GROWS, FASTER = 0.95, 1.05, 1.5
# The task's loss is of order 1: with such a multiplier it no longer moves the gates.
HUGE = 100.0

COLLAPSE, DIVERGENCE, REACH = "collapse", "divergence", "reach"
# What is wrong and how to fix it; knobs by name.
MESSAGES = {
    COLLAPSE: (
        "the gates close too far",
        "lower optimizer.l0_lr (now {l0_lr:g}) or optimizer.lagrangian_lr (now {lagrangian_lr:g})",
    ),
    DIVERGENCE: (
        "the multipliers grow and the gap does not close",
        "lower optimizer.lagrangian_lr (now {lagrangian_lr:g}), or raise optimizer.l0_lr "
        "(now {l0_lr:g}) if the gates hardly move",
    ),
    REACH: (
        "at the present speed the target is missed when the run ends",
        "raise optimizer.l0_lr (now {l0_lr:g}) or optimizer.lagrangian_lr (now "
        "{lagrangian_lr:g}), or train longer (max_duration)",
    ),
}


class Reading(NamedTuple):
    """A constraint after a step: means over layers, and the largest of a layer.

    Attributes:
        target: Target sparsity at this point of the warm-up.
        multiplier: Largest absolute ``lambda_1`` of a layer.
        gap: Largest distance of a layer from ``target``; at least that of ``expected``.
    """

    step: int
    expected: float
    target: float
    multiplier: float
    gap: float


class Finding(NamedTuple):
    """What is wrong with an axis or a budget: the kind, a key of :data:`MESSAGES`, and numbers."""

    kind: str
    axis: str
    text: str


def has_collapsed(density: float, final_target: float | None) -> bool:
    """Whether far less is open than is to stay; an axis may have no target of its own."""
    limit = NEARLY_NOTHING if final_target is None else COLLAPSED * (1.0 - final_target)
    return density < limit


def is_huge(reading: Reading) -> bool:
    """Whether a multiplier drowns the task while the constraint is not met."""
    return reading.multiplier > HUGE and reading.gap > NEAR


def gathers_speed(readings: Sequence[Reading]) -> bool:
    """Whether the gates have begun to follow: they went to the target, faster in the second half.

    Multipliers push longer and longer before gates that are wide open move at all. A window has a
    fixed target and two or more readings in order, here and below.
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
    """
    half = len(readings) // 2
    before, after = (max(r.gap for r in part) for part in (readings[:half], readings[half:]))
    grown = readings[-1].multiplier > GROWS * readings[0].multiplier
    stays = after > WIDE and after >= NOT_CLOSING * before
    return grown and stays and not gathers_speed(readings)


def project(readings: Sequence[Reading], end: int) -> float:
    """Expected sparsity at the end at the mean speed of a window, in [0, 1]."""
    first, last = readings[0], readings[-1]
    speed = (last.expected - first.expected) / (last.step - first.step)
    return min(1.0, max(0.0, last.expected + speed * (end - last.step)))


def misses(readings: Sequence[Reading], end: int) -> bool:
    """Whether the target will not be reached at the speed of a window with a fixed target."""
    last = readings[-1]
    gaps = [r.expected - r.target for r in readings]
    then = project(readings, end) - last.target
    # It passes through the target if it will be on the other side, or has been already.
    passes = gaps[-1] * then < 0.0 or min(gaps) < 0.0 < max(gaps)
    near = abs(gaps[-1]) <= NEAR or abs(then) <= NEAR
    return not (near or passes or gathers_speed(readings))


def judge_gates(
    rows: Mapping[str, Sequence[float]], gates: L0Module, constraints: Mapping[str, Constraint]
) -> list[Finding]:
    """Find the axes and budgets that have collapsed; ``rows`` is the sparsity of every row."""
    targets, found = gates.final_targets(), []
    for axis in dict.fromkeys([*gates.axes, *targets]):
        # A budget may close all heads of a layer that it removes; a target shape may not.
        sparsities = rows[axis] if axis in targets else [sum(rows[axis]) / len(rows[axis])]
        density = 1.0 - max(sparsities)
        if not has_collapsed(density, targets.get(axis)):
            continue
        where = f" of layer {sparsities.index(max(sparsities))}" if len(sparsities) > 1 else ""
        text = f"of {axis}{where} {density:.1%} are expected to stay open"
        if axis in constraints:
            now, final = constraints[axis].target, constraints[axis].final_target
            text += f"; {1.0 - now:.1%} are asked for now, {1.0 - final:.1%} in the end"
        found.append(Finding(COLLAPSE, axis, text))
    return found


def judge_course(name: str, readings: Sequence[Reading], end: int, warm: bool) -> list[Finding]:
    """Find out whether a constraint diverges or will be missed.

    Args:
        readings: Since the target has been what it is, in order; at least one.
        end: Step at which the run ends.
        warm: Whether the warm-up is over; before, the target runs away from the gates.
    """
    last = readings[-1]
    length = max(WINDOW_STEPS, WINDOW_SHARE * end)
    old = [n for n, r in enumerate(readings) if last.step - r.step >= length]
    window = readings[old[-1] :] if old and warm and last.step >= FIRST_SHARE * end else []
    if is_huge(last):
        text = f"{name} gap {last.gap:.3f}, lambda_1 {last.multiplier:.3g}"
        return [Finding(DIVERGENCE, name, text)]
    if window and diverges(window):
        first = window[0]
        text = (
            f"{name} gap {last.gap:.3f} ({last.step - first.step} steps ago {first.gap:.3f}), "
            f"lambda_1 {last.multiplier:.3g} ({first.multiplier:.3g})"
        )
        return [Finding(DIVERGENCE, name, text)]
    if window and misses(window, end):
        text = (
            f"{name} is at sparsity {last.expected:.3f}, the target is {last.target:.3f}, and "
            f"will be at {project(window, end):.3f} at step {end}"
        )
        return [Finding(REACH, name, text)]
    return []


class PruningWarnings(Callback):
    """Looks at the gates a hundred times a run and says once what is going wrong, and the knob.

    * An axis collapses: its expected size is below half of what is to stay, in all or in a layer.
    * The multipliers diverge: after the warm-up they grow over a tenth of the run and the gap does
      not close; or, at any time, one is so large that the task's loss no longer counts.
    * The target is out of reach: after the warm-up, at the speed of the last tenth of the run.
    """

    def __init__(self, l0_module: L0Module, knobs: Mapping[str, float]) -> None:
        self.l0_module = l0_module
        self.knobs = dict(knobs)
        self.readings: dict[str, list[Reading]] = defaultdict(list)
        self.seen: set[tuple[str, str]] = set()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look, if it is time; the ranks have the same gates, and the first one speaks."""
        end = math.ceil(count_batches(state.max_duration, state))
        step = state.timestamp.batch.value
        if step % math.ceil(end / LOOKS) == 0 and dist.get_global_rank() == 0:
            self._say(step, self._look(step, end))

    @torch.no_grad()
    def _look(self, step: int, end: int) -> list[Finding]:
        """Read each constraint, and judge."""
        rows = _fetch(self.l0_module.expected_sparsity())
        multipliers = _fetch(self.l0_module.lambda_1)
        constraints = self.l0_module.constraints()
        found = judge_gates(rows, self.l0_module, constraints)
        for name, constraint in constraints.items():
            readings, target = self.readings[name], constraint.target
            if readings and readings[-1].target != target:
                readings.clear()  # a course towards another target says nothing
            mean, gap = sum(rows[name]) / len(rows[name]), max(abs(v - target) for v in rows[name])
            readings.append(Reading(step, mean, target, max(map(abs, multipliers[name])), gap))
            warm = self.l0_module.warmup_progress >= 1.0
            found += judge_course(name, readings, end, warm)
        return found

    def _say(self, step: int, found: Sequence[Finding]) -> None:
        """Warn once of each kind and axis; one whose multipliers diverge gets no other advice."""
        for kind, (what, fix) in MESSAGES.items():
            covered = {kind, DIVERGENCE} if kind == REACH else {kind}
            new = [f for f in found if f.kind == kind]
            new = [f for f in new if not self.seen & {(k, f.axis) for k in covered}]
            if new:
                self.seen.update((kind, f.axis) for f in new)
                texts = "; ".join(f.text for f in new)
                advice = fix.format(**self.knobs)
                log.warning("step %d: %s: %s. To fix, %s.", step, what, texts, advice)


def _fetch(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return the rows by name, with one wait for the device."""
    sizes = [value.numel() for value in values.values()]
    numbers = iter(torch.cat([value.detach() for value in values.values()]).tolist())
    return {name: list(islice(numbers, size)) for name, size in zip(values, sizes, strict=True)}
