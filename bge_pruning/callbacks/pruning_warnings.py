"""Warns early when gates collapse, multipliers diverge, or the target cannot be reached."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from bge_pruning.models.l0_module_embedding import BUDGET, OPERATIONS, L0Module
from bge_pruning.utils.clock import count_batches

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


log = logging.getLogger(__name__)
# Looks per run, and what a judgement needs: a share of the run, and steps.
LOOKS = 100
WINDOW_SHARE, WINDOW_STEPS = 0.1, 10
# Multipliers begin at 0 and need some time to move anything.
FIRST_SHARE = 0.3


class PruningWarnings(Callback):
    """Looks at the gates a hundred times a run and says once what is going wrong, and the knob.

    * An axis collapses: its expected size is below half of what is to stay, in all or in a layer.
    * An axis runs ahead: its expected sparsity is far beyond what the warm-up asks for, and beyond
      where it started.
    * The constraint diverges: after the warm-up, multipliers grow over a tenth of the run and the
      gap does not close; or, at any time, a multiplier is so large that the task is not heard.
    * The target is out of reach: after the warm-up, at the speed of the last tenth of the run.

    Args:
        l0_module: The gates.
        knobs: Values of ``l0_lr``, ``lagrangian_lr`` and ``lambda_2_lr``, for the advice.
    """

    def __init__(self, l0_module: L0Module, knobs: Mapping[str, float]) -> None:
        self.l0_module = l0_module
        self.knobs = dict(knobs)
        # Now, since a checkpoint to go on from is loaded later.
        self.start = {name: sum(row) / len(row) for name, row in self._fetch_rows().items()}
        self.readings: dict[str, list[Reading]] = defaultdict(list)
        self.told: set[tuple[str, str]] = set()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look, if it is time; the ranks have the same gates, and the first one speaks."""
        end = math.ceil(count_batches(state.max_duration, state))
        step = state.timestamp.batch.value
        if step % math.ceil(end / LOOKS) or dist.get_global_rank() != 0:
            return
        rows = self._look(step)
        self._warn_of_haste(step)
        self._warn_of_collapse(rows, step)
        self._warn_of_divergence(step, end)
        self._warn_of_reach(step, end)

    @torch.no_grad()
    def _fetch_rows(self) -> dict[str, list[float]]:
        """The expected sparsity of every row by axis."""
        return _fetch(self.l0_module.expected_sparsity())

    @torch.no_grad()
    def _look(self, step: int) -> dict[str, list[float]]:
        """Add a reading of each constraint; returns the expected sparsity of every row by axis."""
        rows = self._fetch_rows()
        multipliers = _fetch(self.l0_module.lambda_1)
        for name, constraint in self.l0_module.constraints().items():
            readings, target = self.readings[name], constraint.target
            reading = Reading(
                step,
                sum(rows[name]) / len(rows[name]),
                target,
                max(map(abs, multipliers[name])),
                max(abs(value - target) for value in rows[name]),
            )
            if readings and readings[-1].target != target:
                readings.clear()  # the target runs away from the gates: what was says nothing
            readings.append(reading)
        return rows

    def _window(self, name: str, end: int) -> list[Reading]:
        """The last readings with the final target, or none if they are too few to judge."""
        length, readings = max(WINDOW_STEPS, WINDOW_SHARE * end), self.readings[name]
        if self.l0_module.warmup_progress < 1.0 or readings[-1].step < FIRST_SHARE * end:
            return []
        old = [n for n, r in enumerate(readings) if readings[-1].step - r.step >= length]
        if not old:
            return []
        del readings[: old[-1]]
        return readings

    def _warn_of_collapse(self, rows: Mapping[str, list[float]], step: int) -> None:
        targets = self.l0_module.final_targets()
        budgets = [name for name in (BUDGET, OPERATIONS) if name in targets]
        found = {}
        for axis in [*self.l0_module.axes, *budgets]:
            # A budget may close all heads of a layer that it removes; a target shape may not.
            densities = [1.0 - sum(rows[axis]) / len(rows[axis])]
            if axis in targets:
                densities = [1.0 - value for value in rows[axis]]
            layer = min(range(len(densities)), key=densities.__getitem__)
            if has_collapsed(densities[layer], targets.get(axis)):
                where = f" of layer {layer}" if len(densities) > 1 else ""
                found[axis] = self._describe_collapse(axis, where, densities[layer])
        self._say("collapse", found, step, "the gates close too far", self._slower())

    def _slower(self) -> str:
        return (
            f"lower optimizer.l0_lr{self._now('l0_lr')} or optimizer.lagrangian_lr"
            f"{self._now('lagrangian_lr')}"
        )

    def _warn_of_haste(self, step: int) -> None:
        found = {}
        for name, final in self.l0_module.final_targets().items():
            last = self.readings[name][-1]
            if runs_ahead(last, self.start[name]):
                found[name] = (
                    f"{name} is at sparsity {last.expected:.3f}, asked for are {last.target:.3f} "
                    f"now and {final:.3f} in the end"
                )
        self._say("haste", found, step, "the gates close before they are to", self._slower())

    def _describe_collapse(self, axis: str, where: str, density: float) -> str:
        text = f"of {axis}{where} {density:.1%} are expected to stay open"
        constraints = self.l0_module.constraints()
        if axis not in constraints:
            return text
        target = constraints[axis]
        return (
            f"{text}; {1.0 - target.target:.1%} are asked for now, {1.0 - target.final_target:.1%} "
            f"in the end"
        )

    def _warn_of_divergence(self, step: int, end: int) -> None:
        huge, vain, swinging = {}, {}, {}
        for name in self.l0_module.final_targets():
            last, window = self.readings[name][-1], self._window(name, end)
            if is_huge(last):
                huge[name] = f"{name} gap {last.gap:.3f}, lambda_1 {last.multiplier:.3g}"
            if window and diverges(window):
                first = window[0]
                pushes = last.expected < last.target and not swings(window)
                (vain if pushes else swinging)[name] = (
                    f"{name} gap {last.gap:.3f} ({last.step - first.step} steps ago "
                    f"{first.gap:.3f}), lambda_1 {last.multiplier:.3g} ({first.multiplier:.3g})"
                )
        calmer = f"lower optimizer.lagrangian_lr{self._now('lagrangian_lr')}"
        self._say("huge", huge, step, "a multiplier drowns the loss of the task", calmer)
        what = "the multipliers grow and the gap does not close"
        self._say("diverges", swinging, step, what, calmer)
        stronger = f"raise optimizer.l0_lr{self._now('l0_lr')}, with which the gates follow"
        self._say("diverges", vain, step, what, stronger)

    def _warn_of_reach(self, step: int, end: int) -> None:
        short, over = {}, {}
        for name in self.l0_module.final_targets():
            window = self._window(name, end)
            if window and misses(window, end):
                last, then = window[-1], project(window, end)
                group = short if last.expected < last.target else over
                group[name] = (
                    f"{name} is at sparsity {last.expected:.3f}, the target is {last.target:.3f}, "
                    f"and will be at {then:.3f}"
                )
        rates = (
            f"optimizer.l0_lr{self._now('l0_lr')} or optimizer.lagrangian_lr"
            f"{self._now('lagrangian_lr')}"
        )
        what = f"at the present speed the target is missed when the run ends at step {end}"
        longer = "or train longer (max_duration)"
        self._say("reach", short, step, what, f"raise {rates}, {longer}")
        damp = f"raise optimizer.lambda_2_lr{self._now('lambda_2_lr')}, which damps"
        self._say("reach", over, step, what, f"{damp}, {longer}")

    def _now(self, knob: str) -> str:
        return f" (now {self.knobs[knob]:g})"

    def _say(self, kind: str, found: Mapping[str, str], step: int, what: str, fix: str) -> None:
        """One warning for all axes that have not been warned of."""
        # What a huge multiplier leads to needs no words of its own, and no other advice.
        before = {kind, "huge"} if kind in ("diverges", "reach") else {kind}
        new = {n: text for n, text in found.items() if not {(k, n) for k in before} & self.told}
        if not new:
            return
        self.told.update((kind, name) for name in new)
        log.warning("step %d: %s: %s. To fix, %s.", step, what, "; ".join(new.values()), fix)


def _fetch(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Rows by name, with one wait for the device."""
    sizes = [value.numel() for value in values.values()]
    numbers = iter(torch.cat([value.detach() for value in values.values()]).tolist())
    return {name: _take(numbers, size) for name, size in zip(values, sizes, strict=True)}


def _take(numbers: Iterator[float], size: int) -> list[float]:
    return [next(numbers) for _ in range(size)]
