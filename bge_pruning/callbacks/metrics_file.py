"""All logged metrics in one file, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from torch import Tensor


class MetricsFile(LoggerDestination):
    """Appends one JSON line ``{"batch": int, "metrics": {key: float}}`` per logging call.

    Lines of batches that a resumed run does again are dropped when it starts.

    Args:
        path: File to write, on rank 0 only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.active = dist.get_global_rank() == 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop what lies after the batch that the run goes on from."""
        if not self.active or not self.path.is_file():
            return
        batch = state.timestamp.batch.value
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["batch"] < batch]
        self.path.write_text("".join(kept), encoding="utf-8")

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Append a line."""
        if not self.active:
            return
        values = {key: _number(value) for key, value in metrics.items()}
        row = {"batch": step, "metrics": {k: v for k, v in values.items() if v is not None}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None
