"""Logs the gates, the constraint and a picture of the gates."""

from __future__ import annotations

import torch
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist

from bge_pruning.export.pruning_record import compute_constraint_report
from bge_pruning.model_io.run_checkpoints import gate_arrays
from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.utils.clock import is_due
from bge_pruning.utils.guard import warn_only
from bge_pruning.utils.visualization import draw_gates, render_pixels


class PruningCallback(Callback):
    """Logs gates and constraints every ``log_interval``.

    ``<axis>`` is ``head``, ``intermediate``, ``layer``, ``hidden``, ``encoder`` (the share of
    encoder parameters) or ``operations`` (the share of its operations, with a speed-up as target);
    the constraint of a budget is on one of the last two.

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
    """

    def __init__(self, l0_module: L0Module, log_interval: str) -> None:
        self.l0_module = l0_module
        self.interval = Time.from_timestring(log_interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log at the interval and at the last batch."""
        if is_due(self.interval, state):
            logger.log_metrics(compute_pruning_metrics(self.l0_module))


@torch.no_grad()
def compute_pruning_metrics(l0_module: L0Module) -> dict[str, float]:
    """Compute everything in the table of :class:`PruningCallback`."""
    metrics = {}
    shape = l0_module.realised_shape()
    for axis, row in compute_constraint_report(l0_module, shape).items():
        metrics[f"pruning/expected_sparsity/{axis}"] = row.expected_sparsity
        metrics[f"pruning/realised_sparsity/{axis}"] = row.realised_sparsity
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


class GateMapCallback(Callback):
    """Logs the image ``gates`` every ``eval_interval`` and at the last batch."""

    def __init__(self, l0_module: L0Module, eval_interval: str) -> None:
        self.l0_module = l0_module
        self.interval = Time.from_timestring(eval_interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Draw the present gates, and mark what a cut would keep."""
        if dist.get_global_rank() != 0 or not is_due(self.interval, state):
            return
        with warn_only("drawing the gates", "look at the gates in the report of the run"):
            arrays = gate_arrays(self.l0_module)
            gates = {axis: values for axis, values in arrays.items() if f"{axis}_kept" in arrays}
            figure = draw_gates(gates, {axis: arrays[f"{axis}_kept"] for axis in gates})
            image = render_pixels(figure)
            logger.log_images(image, name="gates", channels_last=True, use_table=False)
