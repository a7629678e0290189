"""Ends a run on SIGTERM or Ctrl-C, after finishing and saving the current step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from bge_pruning.utils.run_log import SIGNALS, StoppedError

STDERR = 2


class StopOnSignal(Algorithm):
    """Finishes the current step, saves a checkpoint, and ends the run with :class:`StoppedError`.

    Clusters send SIGTERM to processes that they are about to kill; Ctrl-C means the same. The ranks
    agree after every step, so that all of them stop after the same one, whichever received it. A
    second signal of the same kind ends the process at once; Composer's launcher sends SIGTERM after
    Ctrl-C. It handles signals only inside its context.

    Args:
        resume: How to go on, for the message.
    """

    def __init__(self, resume: str) -> None:
        self.resume = resume
        self.told = 0  # the number of the signal that this rank received, or another one
        self.stopping = 0  # that of the signal that all ranks have agreed on
        self._process = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if kind is None and self.told:
            raise StoppedError(
                f"stopped by {SIGNALS[self.told]} after the last step. To make the report, "
                f"{self.resume}.",
                self.told,
            )

    def _notice(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        # The processes that load data have this handler too.
        if not self.told and os.getpid() == self._process and dist.get_global_rank() == 0:
            name = SIGNALS[number]
            text = f"\n{name}: the step is finished and saved, then the run ends. A second {name} "
            # The signal may have interrupted a logger.
            os.write(STDERR, f"{text}ends it at once.\n".encode())
        self.told = self.told or number

    def match(self, event: Event, state: State) -> bool:
        """Run between steps, and after the last."""
        return event in (Event.BATCH_END, Event.BATCH_START, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Agree after a step; end the run before the next one, after the checkpoint."""
        step = state.timestamp.batch.value
        if event == Event.BATCH_START:
            if self.stopping:
                raise StoppedError(
                    f"stopped by {SIGNALS[self.stopping]} after step {step}, which is saved. To "
                    f"resume, {self.resume}.",
                    self.stopping,
                )
            return
        self.stopping = self._anyone_told(state)
        self.told = self.told or self.stopping

    def _anyone_told(self, state: State) -> int:
        if dist.get_world_size() == 1:
            return self.told
        told = state.device.tensor_to_device(torch.tensor([self.told]))
        dist.all_reduce(told, reduce_operation="MAX")
        return int(told.item())

    def save_interval(self, interval: str) -> Callable[[State, Event], bool]:
        """Decide when checkpoints are written: at an interval, and before a signal ends the run."""
        is_time = create_interval_scheduler(interval)
        return lambda state, event: (
            is_time(state, event) or (bool(self.stopping) and event == Event.BATCH_CHECKPOINT)
        )
