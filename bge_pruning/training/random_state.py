"""Restore the random state of a checkpoint when a run resumes."""

from __future__ import annotations

from collections.abc import Callable

from composer.core import Algorithm, Event, State
from composer.loggers import Logger


class RandomStateOnResume(Algorithm):
    """Restores the random state before the first batch after a restart inside an epoch.

    The trainer restores it while it skips the batches that were trained on. Our data resume without
    skipping, where the trainer does not restore it: dropout would draw other numbers.

    Args:
        restore: Restores the state of the checkpoint, the first time that it is called.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        self.restore = restore

    def match(self, event: Event, state: State) -> bool:
        """Run before each batch, after the loader has drawn its own seed."""
        return event == Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Restore the state."""
        self.restore()
