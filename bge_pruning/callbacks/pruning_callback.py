"""Logs how the gates and the constraint are doing."""

from __future__ import annotations

import logging
import time

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist

from bge_pruning.clock import elapsed_share, is_due
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.pruning_record import compute_constraint_report

log = logging.getLogger(__name__)

SHORT_NAMES = {"encoder": "params", "intermediate": "units", "head": "heads", "layer": "layers"}


class PruningCallback(Callback):
    """Logs every ``log_interval`` and prints one line that a person can follow.

    ``<axis>`` is ``head``, ``intermediate``, ``layer``, ``hidden`` or ``encoder`` (the share of
    encoder parameters); the constraint of a budget is on ``encoder``.

    ======================================  ====================================================
    key                                     value
    ======================================  ====================================================
    ``pruning/expected_sparsity/<axis>``    expected fraction removed (mean over layers)
    ``pruning/target_sparsity/<axis>``      target at this point of the warm-up
    ``pruning/realised_sparsity/<axis>``    fraction that extraction would remove now
    ``pruning/distance/<axis>``             largest distance of a layer from the current target
    ``pruning/lambda_1/<axis>``             multiplier of the linear term (mean over layers)
    ``pruning/lambda_2/<axis>``             multiplier of the quadratic term (mean over layers)
    ``pruning/binary_distance/<axis>``      mean distance of open probabilities from {0, 1}
    ``pruning/open_share/<axis>``           share of gates open with probability over one half
    ``pruning/expected_parameters/<part>``  encoder, embeddings, pooler, heads, total
    ``pruning/expected_density``            expected share of the encoder's parameters kept
    ======================================  ====================================================

    Args:
        l0_module: The gates, or ``None`` for a run without gates: then only the line is printed.
        log_interval: Time string.
    """

    def __init__(self, l0_module: L0Module | None, log_interval: str) -> None:
        self.l0_module = l0_module
        self.interval = Time.from_timestring(log_interval)
        self.started: tuple[float, int, float] | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock of the steps-per-second figure."""
        self.started = (time.monotonic(), state.timestamp.batch.value, elapsed_share(state))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log at the interval and at the last batch."""
        if not is_due(self.interval, state):
            return
        metrics = {} if self.l0_module is None else compute_pruning_metrics(self.l0_module)
        if metrics:
            logger.log_metrics(metrics)
        if dist.get_global_rank() == 0:
            log.info("%s", self._line(state, metrics))

    def _line(self, state: State, metrics: dict[str, float]) -> str:
        batch = state.timestamp.batch.value
        # Of the whole batch over all ranks; state.loss is that of the last microbatch.
        losses = {key.rsplit("/", 1)[-1]: value for key, value in state.total_loss_dict.items()}
        start, first_batch, first_share = self.started
        spent, share = time.monotonic() - start, elapsed_share(state)
        seconds = spent / max(1, batch - first_batch)
        left = spent * (1.0 - share) / max(share - first_share, 1e-9)
        parts = [f"step {batch}", f"{seconds:.2f} s/step", f"{left / 60:.1f} min left"]
        parts += [f"{name} {value:.4f}" for name, value in losses.items()]
        if metrics:
            rows = [
                f"{SHORT_NAMES.get(axis, axis)} {metrics[f'pruning/expected_sparsity/{axis}']:.3f}"
                f"/{metrics[f'pruning/target_sparsity/{axis}']:.3f}"
                for axis in self.l0_module.final_targets()
            ]
            parts.append("sparsity expected/target: " + " ".join(rows))
        return " | ".join(parts)


@torch.no_grad()
def compute_pruning_metrics(l0_module: L0Module) -> dict[str, float]:
    """Everything in the table of :class:`PruningCallback`."""
    metrics = {}
    shape = l0_module.realised_shape()
    for axis, row in compute_constraint_report(l0_module, shape).items():
        metrics[f"pruning/expected_sparsity/{axis}"] = row["expected_sparsity"]
        metrics[f"pruning/realised_sparsity/{axis}"] = row["realised_sparsity"]
    for name, constraint in l0_module.constraints().items():
        gap = constraint.expected - constraint.target
        metrics[f"pruning/target_sparsity/{name}"] = constraint.target
        metrics[f"pruning/distance/{name}"] = float(gap.abs().max())
        metrics[f"pruning/lambda_1/{name}"] = float(l0_module.lambda_1[name].mean())
        metrics[f"pruning/lambda_2/{name}"] = float(l0_module.lambda_2[name].mean())
    for axis, p in l0_module.open_probabilities().items():
        metrics[f"pruning/binary_distance/{axis}"] = float(torch.minimum(p, 1 - p).mean())
        metrics[f"pruning/open_share/{axis}"] = float((p > 0.5).float().mean())
    for part, count in l0_module.expected_parameters().as_dict().items():
        metrics[f"pruning/expected_parameters/{part}"] = float(count)
    source = count_parameters(l0_module.shape)
    metrics["pruning/expected_density"] = (
        metrics["pruning/expected_parameters/encoder"] / source.encoder
    )
    return metrics
