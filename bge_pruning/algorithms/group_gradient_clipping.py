"""Gradient clipping by optimizer group."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger


class GroupGradientClipping(Algorithm):
    """Clips the gradient norm of weights, gates and multipliers apart.

    The multipliers' gradient grows with them; clipped by one global norm, as Composer's own
    ``GradientClipping`` does, it would squeeze the gradient of the task.

    Args:
        max_norm: Largest norm of each group's gradient. Groups of one ``name`` count as one.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def match(self, event: Event, state: State) -> bool:
        """After the backward pass, before the optimizer step."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip."""
        named: dict[str, list[torch.nn.Parameter]] = {}
        for group in state.optimizers[0].param_groups:
            named.setdefault(group["name"].split("/")[0], []).extend(group["params"])
        for parameters in named.values():
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
