"""Gradient clipping by optimizer group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.distributed.tensor import DTensor


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
            clip_norm_(parameters, self.max_norm)


def clip_norm_(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> None:
    """Clip the norm of all gradients together, of which some may be sharded over the ranks.

    Args:
        parameters: With gradients, or without.
        max_norm: Largest norm.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p, DTensor)]
    if not sharded:
        torch.nn.utils.clip_grad_norm_(with_gradient, max_norm)
        return
    whole = [p for p in with_gradient if not isinstance(p, DTensor)]
    get_norm = torch.nn.utils.get_total_norm
    # The sum over the ranks is taken when the sharded norm is made whole.
    norms = [get_norm([p.grad for p in sharded]).full_tensor()]
    if whole:
        norms.append(get_norm([p.grad for p in whole]))
    total = torch.stack(norms).norm()
    for part in (sharded, whole):
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, total)
