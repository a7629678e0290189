"""Puts the random numbers of a resumed run where the checkpoint had them."""

from __future__ import annotations

from collections.abc import Callable

from composer.core import Algorithm, Event, State
from composer.loggers import Logger


class RandomStateOnResume(Algorithm):
    """Restores the random state before the first batch after a restart inside an epoch.

    The trainer does it while it skips the batches that were trained on. Our data goes on without
    skipping, and then it does not: dropout would draw other numbers.

    Args:
        restore: Restores the state of the checkpoint, the first time that it is called.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        self.restore = restore

    def match(self, event: Event, state: State) -> bool:
        """Before each batch, after the loader has drawn its own seed."""
        return event == Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Restore it."""
        self.restore()
