"""Ends a run on SIGTERM, after finishing and saving the current step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from bge_pruning.utils.run_log import StoppedError

log = logging.getLogger(__name__)


class StopOnSignal(Algorithm):
    """Finishes the current step, saves a checkpoint, and ends the run with :class:`StoppedError`.

    Clusters send SIGTERM to processes that they are about to kill. The ranks agree after every
    step, so that all of them stop after the same one, whichever received it. A second signal ends
    the process at once. It handles signals only inside its context.
    """

    def __init__(self) -> None:
        self.told = False
        self.stopping = False
        self._before: Any = None

    def __enter__(self) -> StopOnSignal:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None
        if kind is None and self.told:
            raise StoppedError(
                "stopped by SIGTERM after the last step. To make the report, run the same command "
                "with autoresume=true."
            )

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def match(self, event: Event, state: State) -> bool:
        """Run between steps."""
        return event in (Event.BATCH_END, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Agree after a step; end the run before the next one, after the checkpoint."""
        step = state.timestamp.batch.value
        if event == Event.BATCH_END:
            self.stopping = self._anyone_told(state)
            if self.stopping:
                log.info("SIGTERM: step %d is saved, then the run ends", step)
        elif self.stopping:
            raise StoppedError(
                f"stopped by SIGTERM after step {step}, which is saved. To resume, run the same "
                f"command with autoresume=true."
            )

    def _anyone_told(self, state: State) -> bool:
        if dist.get_world_size() == 1:
            return self.told
        told = state.device.tensor_to_device(torch.tensor([int(self.told)]))
        dist.all_reduce(told, reduce_operation="MAX")
        return bool(told.item())

    def save_interval(self, interval: str) -> Callable[[State, Event], bool]:
        """Decide when checkpoints are written: at an interval, and before a signal ends the run."""
        is_time = create_interval_scheduler(interval)
        return lambda state, event: (
            is_time(state, event) or (self.stopping and event == Event.BATCH_CHECKPOINT)
        )
