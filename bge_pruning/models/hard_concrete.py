"""The hard concrete gate (Louizos et al., 2018, arXiv:1712.01312): pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA = -0.1
ZETA = 1.1
BETA = 2.0 / 3.0

# The log_alpha at which a gate is open with probability one half.
THRESHOLD = BETA * math.log(-GAMMA / ZETA)
# Clamping keeps gradients alive. The range is symmetric around THRESHOLD, so that a gate at the
# upper end is open, and one at the lower end closed, with the same probability (0.998). A range
# symmetric around 0 would leave 5 % of every closed gate in the expected sparsity.
LOG_ALPHA_MAX = math.log(100.0)
LOG_ALPHA_MIN = 2.0 * THRESHOLD - LOG_ALPHA_MAX


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Sample gates in [0, 1] by the reparameterisation of equation 10-11 of the paper.

    They are differentiable in ``log_alpha``; exactly 0 and exactly 1 have probability above zero.
    The noise ``uniform`` is in the open interval (0, 1).
    """
    s = torch.sigmoid((torch.logit(uniform) + log_alpha) / BETA)
    return torch.clamp(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Probability ``P(z > 0)`` of each gate, equation 12 of the paper; differentiable."""
    return torch.sigmoid(log_alpha - THRESHOLD)


def top_k(log_alpha: Tensor, k: int) -> Tensor:
    """Deterministic binary gates: the ``k`` largest of the last dimension are 1, the rest 0.

    Ties go to the lower index, on every device.

    Raises:
        ValueError: If ``k`` is not in [0, n], or a gate is NaN.
    """
    n = log_alpha.shape[-1]
    if not 0 <= k <= n:
        fix = "fewer" if k > n else "0 or more"
        raise ValueError(f"k {k} is not in [0, {n}], the number of gates. To fix, choose {fix}.")
    if broken := int(log_alpha.isnan().sum()):
        # NaN would sort above every number, so the gate would be kept.
        raise ValueError(
            f"log_alpha: {broken} of {log_alpha.numel()} gates are NaN: training diverged. To fix, "
            f"use an earlier checkpoint and lower optimizer.l0_lr."
        )
    return top_k_unchecked(log_alpha, k)


def top_k_unchecked(log_alpha: Tensor, k: int) -> Tensor:
    """:func:`top_k` without its checks, which would make the host wait for the device."""
    order = torch.sort(log_alpha.detach(), dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(log_alpha).scatter(-1, order[..., :k], 1.0)
