"""Gradients by optimizer group: clipping, and means over the ranks of a sharded run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bge_pruning.algorithms.non_finite import NonFiniteGuard, own_numbers


class GroupGradientClipping(Algorithm):
    """Clips the gradient norms of weights, gates and multipliers separately.

    The multipliers' gradient grows with them; under one global norm, as in Composer's own
    ``GradientClipping``, it would shrink the gradient of the task. Groups of one ``name`` count as
    one. The guard has measured the norms of the gradients already.
    """

    def __init__(self, max_norm: float, guard: NonFiniteGuard) -> None:
        self.max_norm = max_norm
        self.guard = guard

    def match(self, event: Event, state: State) -> bool:
        """After the backward pass, before the optimizer step."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip."""
        named: dict[str, list[nn.Parameter]] = {}
        for group in state.optimizers[0].param_groups:
            named.setdefault(group["name"].split("/")[0], []).extend(group["params"])
        norms = self.guard.gradient_norms()
        for parameters in named.values():
            clip_norm_(parameters, self.max_norm, norms)


def clip_norm_(
    parameters: Sequence[nn.Parameter], max_norm: float, norms: Mapping[nn.Parameter, Tensor]
) -> None:
    """Clip the norm of all gradients together; some may be sharded over the ranks.

    Norms that are not known are computed.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        return
    sharded = [p for p in with_gradient if isinstance(p, DTensor)]
    whole = [p for p in with_gradient if not isinstance(p, DTensor)]
    get_norm = nn.utils.get_total_norm
    parts = [norms[p] for p in whole if p in norms]
    if unknown := [own_numbers(p.grad) for p in whole if p not in norms]:
        parts.append(get_norm(unknown))
    if sharded:  # full_tensor() sums over the ranks
        parts.append(get_norm([p.grad for p in sharded]).full_tensor())
    total = torch.stack(parts).norm()
    # As torch's clip_grads_with_norm_, which cannot scale the rows of a table.
    share = (max_norm / (total + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([own_numbers(p.grad) for p in with_gradient], share)


class MeanGradients(Algorithm):
    """Makes every gradient the mean over the ranks, before it is clipped.

    Sharding ignores parameters that are whole on every rank, so each rank would move gates,
    multipliers and temperature differently. One message averages all of them. Sharded gradients
    are summed already; on some backends they are not divided, but ``sharded_scale`` times the mean.
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
