"""Loggers of metrics: a file for the report, and W&B."""

from __future__ import annotations

import json
import os
from numbers import Real
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.loggers import WandBLogger as ComposerWandBLogger
from composer.utils import dist
from torch import Tensor


class MetricsFile(LoggerDestination):
    """Appends one JSON line ``{"batch": int, "metrics": {key: float}}`` per call, on rank 0.

    A checkpoint records the length of the file, so that a resumed run drops only the lines of the
    steps that it repeats.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.active = dist.get_global_rank() == 0
        self.start: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the file in bytes, for checkpoints."""
        return {"bytes": self.path.stat().st_size if self.path.is_file() else 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember where training resumes; a run that is finished keeps all lines."""
        self.start = state["bytes"]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop what was logged after the checkpoint, or everything if there was none."""
        start = self.start if state.timestamp.batch.value else 0
        if start is None or not self.active or not self.path.is_file():
            return
        if self.path.stat().st_size > start:
            os.truncate(self.path, start)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append a line."""
        if not self.active:
            return
        values = {key: _number(value) for key, value in metrics.items()}
        numbers = {key: value for key, value in values.items() if value is not None}
        if not numbers:
            return
        row = {"batch": step, "metrics": numbers}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, Real) else None


class WandBLogger(ComposerWandBLogger):
    """Logs to W&B 0.31 too, which has replaced ``get_url()``, used by Composer 0.32, by ``url``."""

    def init(self, state: State, logger: Logger) -> None:
        """Add the missing method to runs, and start one."""
        from wandb.sdk.wandb_run import Run

        if not hasattr(Run, "get_url"):
            Run.get_url = lambda run: run.url
        super().init(state, logger)
