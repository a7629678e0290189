"""A picture of the gates at every evaluation, for loggers that show pictures."""

from __future__ import annotations

from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist

from bge_pruning.model_io.gate_file import gate_arrays
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.utils.clock import is_due
from bge_pruning.utils.figures import render_pixels
from bge_pruning.utils.gate_map import draw_gates
from bge_pruning.utils.guard import warn_only


class GateMapCallback(Callback):
    """Logs the image ``gates`` every ``eval_interval`` and at the last batch.

    Args:
        l0_module: The gates.
        eval_interval: Time string.
    """

    def __init__(self, l0_module: L0Module, eval_interval: str) -> None:
        self.l0_module = l0_module
        self.interval = Time.from_timestring(eval_interval)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Draw the gates as they are now, and what a cut would keep."""
        if dist.get_global_rank() != 0 or not is_due(self.interval, state):
            return
        with warn_only("drawing the gates", "look at the gates in the report of the run"):
            arrays = gate_arrays(self.l0_module)
            gates = {axis: values for axis, values in arrays.items() if f"{axis}_kept" in arrays}
            figure = draw_gates(gates, {axis: arrays[f"{axis}_kept"] for axis in gates})
            image = render_pixels(figure)
            logger.log_images(image, name="gates", channels_last=True, use_table=False)
