"""Logs the progress of a run: a line for each interval, checkpoints, start and end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State, Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from bge_pruning.utils.clock import count_batches, elapsed_share, is_due
from bge_pruning.utils.run_log import FILE_ONLY

SHORT_NAMES = {"intermediate": "units", "head": "heads", "layer": "layers"}
# Parts of the loss that are about the size, not about the task.
CONSTRAINT = ("lagrangian", "binarization")
# Budgets: their constraint is the only one and needs no name.
WHOLE = ("encoder", "operations")


def render_line(
    step: int,
    steps: int,
    metrics: Mapping[str, float],
    final_targets: Mapping[str, float],
    lr: float,
    seconds_left: float,
) -> str:
    """Render the line, without its time.

    ``metrics`` are the newest values of all logged metrics; ``lr`` is that of the weights.
    """
    parts = [f"step {step}/{steps}", _losses(metrics)]
    known = {a: t for a, t in final_targets.items() if f"pruning/target_sparsity/{a}" in metrics}
    if known:
        parts.append(_sparsity(metrics, known))
    if "data/texts_per_second" in metrics:
        parts.append(f"{metrics['data/texts_per_second']:.0f} texts/s")
    sources = _collect(metrics, "data/loss/")
    if len(sources) > 1:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in sorted(sources.items()))
        parts.append(f"by source {shown}")
    parts.append(f"lr {lr:.1e}")
    if "numerics/skipped_steps" in metrics:
        parts.append(f"skipped {metrics['numerics/skipped_steps']:.0f}")
    return "  ".join([*parts, f"left {render_time(seconds_left)}"])


def render_time(seconds: float) -> str:
    """A length of time in the unit that fits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _collect(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    found = {key: value for key, value in metrics.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _losses(metrics: Mapping[str, float]) -> str:
    """The loss of the task and, where there are gates, what holds them to their target."""
    losses = _collect(metrics, "loss/train/")
    total = losses.pop("total")
    constraint = {name: losses.pop(name) for name in CONSTRAINT if name in losses}
    held = sum(constraint.values())
    line = f"loss {total - held:.4f}" + _in_brackets(losses)
    return line + (f"  constraint {held:.3f}{_in_brackets(constraint)}" if constraint else "")


def _in_brackets(losses: Mapping[str, float]) -> str:
    """The parts of a loss, if it has more than one."""
    shown = [f"{n.removeprefix('distillation_')} {value:.3f}" for n, value in losses.items()]
    return f" ({', '.join(shown)})" if len(shown) > 1 else ""


def _sparsity(metrics: Mapping[str, float], final_targets: Mapping[str, float]) -> str:
    shown = []
    for axis in final_targets:
        name = "" if axis in WHOLE else f"{SHORT_NAMES.get(axis, axis)} "
        expected, target = (
            metrics[f"pruning/{kind}_sparsity/{axis}"] for kind in ("expected", "target")
        )
        shown.append(f"{name}{expected:.3f} of {target:.3f}")
    line = f"sparsity {', '.join(shown)}"
    if len(final_targets) == 1 and f"{target:.3f}" != (last := f"{final_targets[axis]:.3f}"):
        line += f" (target {last})"
    return line


log = logging.getLogger(__name__)


class ProgressLog(LoggerDestination):
    """Logs one line every ``log_interval`` and at the last batch, from the metrics of that step.

    It is a logger, because loggers run after the callbacks: all metrics of the step are known.
    Where the console shows a progress bar, the lines are for the log file only.
    """

    def __init__(
        self, log_interval: str, final_targets: Mapping[str, float], on_console: bool = True
    ) -> None:
        self.interval = Time.from_timestring(log_interval)
        self.final_targets = dict(final_targets)
        self.extra = {FILE_ONLY: not on_console}
        self.active = dist.get_global_rank() == 0
        self.latest: dict[str, Any] = {}
        self.started: tuple[float, float] | None = None
        self._saved: str | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember the newest values."""
        self.latest.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self.started = (time.monotonic(), elapsed_share(state))
        step = state.timestamp.batch.value
        if self.active:
            what = f"resumes after step {step}" if step else "starts"
            log.info("training %s, to step %d", what, _steps(state))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the line if it is due."""
        if self.active and is_due(self.interval, state):
            log.info("%s", self._line(state), extra=self.extra)

    def _line(self, state: State) -> str:
        start, first_share = self.started
        share = elapsed_share(state)
        left = (time.monotonic() - start) * (1.0 - share) / max(share - first_share, 1e-9)
        rate = state.optimizers[0].param_groups[0]["lr"]
        step = state.timestamp.batch.value
        return render_line(step, _steps(state), self.latest, self.final_targets, rate, left)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Log a checkpoint that has just been written."""
        savers = [c for c in state.callbacks if isinstance(c, CheckpointSaver)]
        saved = [path for saver in savers for path in saver.saved_checkpoints[-1:]]
        if self.active and saved and saved[-1] != self._saved:
            self._saved = saved[-1]
            log.info("checkpoint %s written", Path(saved[-1]).name)

    epoch_checkpoint = batch_checkpoint


def _steps(state: State) -> int:
    return math.ceil(count_batches(state.max_duration, state))
