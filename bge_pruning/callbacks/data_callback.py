"""Logs the input: rows per second, padding, and each source's share and loss."""

from __future__ import annotations

import math
import time
from collections import defaultdict

from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from bge_pruning.utils.clock import is_due


class DataCallback(Callback):
    """Logs the training batches since the last ``log_interval``.

    ============================  ================================================================
    key                           value
    ============================  ================================================================
    ``data/rows_per_second``      rows trained on, over all ranks, without evaluation
    ``data/texts_per_second``     texts of these rows
    ``data/padding_share``        share of this rank's tokens that was padding
    ``data/share/<source>``       share of the batches that came from the source
    ``data/loss/<source>``        mean loss over those batches, without the constraint
    ============================  ================================================================
    """

    def __init__(self, log_interval: str) -> None:
        self.interval = Time.from_timestring(log_interval)
        self._reset()

    def _reset(self) -> None:
        self.seconds, self.rows, self.texts, self.padded = 0.0, 0, 0, 0
        # Tensors: reading their values in every step would wait for the device.
        self.real: list[Tensor] = []
        self.losses: dict[str, list[float]] = defaultdict(list)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Count the batch, which the trainer splits if it is larger than a microbatch."""
        self.started = time.monotonic()
        mask = state.batch["attention_mask"]
        self.rows += len(mask) * dist.get_world_size()
        self.texts += mask.shape[0] * mask.shape[1] * dist.get_world_size()
        self.real.append(mask.sum())
        self.padded += mask.numel()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Add the loss, and log at the interval and at the last batch."""
        self.seconds += time.monotonic() - self.started
        # These are losses of the whole batch over all ranks.
        losses = {key.rsplit("/", 1)[-1]: value for key, value in state.total_loss_dict.items()}
        gates = losses.get("lagrangian", 0.0) + losses.get("binarization", 0.0)
        task = losses["total"] - gates
        if math.isfinite(task):  # otherwise the step was skipped
            self.losses[state.batch.get("source", "data")].append(task)
        if not is_due(self.interval, state):
            return
        logger.log_metrics(self._metrics())
        self._reset()

    def _metrics(self) -> dict[str, float]:
        batches = sum(len(values) for values in self.losses.values())
        seconds = max(self.seconds, 1e-9)
        metrics = {
            "data/rows_per_second": self.rows / seconds,
            "data/texts_per_second": self.texts / seconds,
            "data/padding_share": 1.0 - float(sum(self.real)) / self.padded,
        }
        for name, values in self.losses.items():
            metrics[f"data/share/{name}"] = len(values) / batches
            metrics[f"data/loss/{name}"] = sum(values) / len(values)
        return metrics
