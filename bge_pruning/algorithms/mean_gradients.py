"""Gradients of a sharded run as means over all ranks."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.tensor import DTensor


class MeanGradients(Algorithm):
    """Makes every gradient the mean over the ranks, before it is clipped.

    Sharding does not look at parameters that are whole on every rank: each rank would move gates,
    multipliers and temperature in a way of its own. One message carries all of them, and every
    rank gets the same sum. What is sharded is summed up already, on some backends without being
    divided.

    Args:
        sharded_scale: What a sharded gradient is, as a multiple of the mean over the ranks.
    """

    def __init__(self, sharded_scale: float = 1.0) -> None:
        self.sharded_scale = sharded_scale

    def match(self, event: Event, state: State) -> bool:
        """After the backward pass, before the optimizer step."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Average."""
        parameters = [p for group in state.optimizers[0].param_groups for p in group["params"]]
        trained = [p for p in parameters if p.grad is not None]
        if self.sharded_scale != 1.0:
            for parameter in trained:
                if isinstance(parameter, DTensor):
                    parameter.grad.div_(self.sharded_scale)
        _average([p.grad for p in trained if not isinstance(p, DTensor)])


def _average(gradients: list[torch.Tensor]) -> None:
    if not gradients:
        return
    message = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(message)
    message /= dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, message.split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
