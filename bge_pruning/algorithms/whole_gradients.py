"""Gradients of what is not sharded, over all ranks."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.tensor import DTensor


class WholeGradients(Algorithm):
    """Averages the gradients of whole parameters in a sharded run, before they are clipped.

    Sharding averages what it shards, and nothing averages gates, multipliers and temperature: each
    rank would move its own. One message carries all of them, and every rank gets the same sum.
    """

    def match(self, event: Event, state: State) -> bool:
        """After the backward pass, before the optimizer step."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Average."""
        gradients = [
            parameter.grad
            for group in state.optimizers[0].param_groups
            for parameter in group["params"]
            if parameter.grad is not None and not isinstance(parameter, DTensor)
        ]
        if not gradients:
            return
        message = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(message)
        message /= dist.get_world_size()
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, message.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))
