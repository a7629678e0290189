"""Guides the gates through training: noise and target of each step, binarization, clamping."""

from __future__ import annotations

from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger

from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.utils.clock import count_batches


class PruningSchedule(Algorithm):
    """Sets the gates' step and progress before a batch and clamps them after it.

    All settings follow from the trainer's clock, so a resumed run continues exactly. The target is
    reached linearly within ``lagrangian_warmup_steps`` (``"300ba"``, ``"0.3dur"``).
    """

    def __init__(self, l0_module: L0Module, lagrangian_warmup_steps: str) -> None:
        self.l0_module = l0_module
        self.warmup = Time.from_timestring(lagrangian_warmup_steps)

    def match(self, event: Event, state: State) -> bool:
        """Run before each batch and after each optimizer step."""
        return event in (Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Set step and progress, or clamp."""
        if event == Event.BATCH_END:
            self.l0_module.clamp_()
            return
        self.l0_module.step = state.timestamp.batch.value
        self.l0_module.warmup_progress = compute_progress(state, self.warmup)
        self.l0_module.binarization_progress = compute_binarization_progress(state, self.warmup)


def compute_progress(state: State, warmup: Time) -> float:
    """Share of the warm-up that is over, in [0, 1]."""
    if warmup.value == 0:
        return 1.0
    return min(1.0, state.timestamp.batch.value / count_batches(warmup, state))


def compute_binarization_progress(state: State, warmup: Time) -> float:
    """Share of what comes after the warm-up that is over, in [0, 1]; 1 in the last batch."""
    first = count_batches(warmup, state)
    rest = count_batches(state.max_duration, state) - 1 - first
    batch = state.timestamp.batch.value
    return min(1.0, max(0.0, (batch - first) / rest)) if rest > 0 else float(batch >= first)
