"""Restore the random state of a checkpoint when a run resumes."""

from __future__ import annotations

from composer import Trainer
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import reproducibility


class RandomStateOnResume(Algorithm):
    """Restores the random state before the first batch after a restart inside an epoch.

    The trainer restores it while it skips the batches that were trained on. Our data resume without
    skipping, where the trainer does not restore it: dropout would draw other numbers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def match(self, event: Event, state: State) -> bool:
        """Run before the first batch, after the loader has drawn its own seed."""
        return event == Event.BATCH_START and self.trainer._rng_state is not None

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Restore the state of the checkpoint."""
        reproducibility.load_rng_state(self.trainer._rng_state)
        self.trainer._rng_state = None
