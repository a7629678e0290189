"""LayerNorm over the dimensions whose gates are open, with its gradient written out.

Left to autograd, the formula takes a dozen passes over memory and keeps five tensors of the size of
its input; this keeps one, and a number for each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_layer_norm(
    u: Tensor, weight: Tensor, bias: Tensor, eps: float, hidden_z: Tensor
) -> Tensor:
    """LayerNorm whose statistics are weighted by the hidden gates.

    ``n = sum(z)``, ``mean = sum(z u) / n``, ``var = sum(z (u - mean)^2) / n`` and the output is
    ``((u - mean) / sqrt(var + eps) * weight + bias) * z``. With binary gates this is LayerNorm
    over the open dimensions and 0 elsewhere; with soft gates it is a smooth relaxation.

    Under autocast the statistics are float32, as in torch's own LayerNorm.

    Args:
        u: Input, shape ``(..., H)``.
        weight: Shape ``(H,)``.
        bias: Shape ``(H,)``.
        eps: Added to the variance.
        hidden_z: Gates in [0, 1], shape ``(H,)``, not all 0.

    Returns:
        Shape ``(..., H)``.
    """
    return _MaskedLayerNorm.apply(u, weight, bias, eps, hidden_z)


class _MaskedLayerNorm(torch.autograd.Function):
    """``y = x * (weight z) + bias z`` with ``x = (u - mean) / sqrt(var + eps)``."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, eps: float, hidden_z: Tensor
    ) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            wide = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
            z = hidden_z.to(wide.dtype)
            share = z / z.sum()
            x = wide - (wide @ share).unsqueeze(-1)
            rstd = ((x * x) @ share).add_(eps).rsqrt_().unsqueeze(-1)
            x.mul_(rstd)
            y = torch.addcmul(bias * z, x, weight * z)
        ctx.save_for_backward(x, rstd, weight, bias, z)
        ctx.dtypes = u.dtype, hidden_z.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight, bias, z = ctx.saved_tensors
        # A compiler would run this under the autocast of the forward pass.
        with torch.autocast(x.device.type, enabled=False):
            d_u, d_scale, d_shift, d_z = _gradients(g.to(x.dtype), x, rstd, weight, bias, z)
        u_dtype, z_dtype = ctx.dtypes
        return d_u.to(u_dtype), d_scale * z, d_shift * z, None, d_z.to(z_dtype)


def _gradients(
    g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``u``, ``weight z``, ``bias z`` and ``z`` from that of ``y``."""
    size = z.sum()
    share, scale = z / size, weight * z
    gx = g * x
    first = (g @ scale).unsqueeze(-1)  # sum_h dL/dx
    second = (gx @ scale).unsqueeze(-1)  # sum_h x dL/dx
    rows = (-1, x.shape[-1])
    d_scale, d_shift = gx.reshape(rows).sum(0), g.reshape(rows).sum(0)
    # dL/du = rstd (dL/dx - share (x second + first)): mean and variance follow u.
    spread = x * second
    d_share = _sum(x, spread, first)
    d_u = torch.addcmul(g * scale, spread.add_(first), share, value=-1.0).mul_(rstd)
    d_z = (d_share - d_share @ share) / size + d_scale * weight + d_shift * bias
    return d_u, d_scale, d_shift, d_z


def _sum(x: Tensor, spread: Tensor, first: Tensor) -> Tensor:
    """``dL/dshare = -sum_N (x^2 second / 2 + x first)``, but for what is the same for all ``h``.

    That part goes when the sum of the shares is kept at 1.
    """
    half = torch.add(first, spread, alpha=0.5)
    return -(x * half).reshape(-1, x.shape[-1]).sum(0)
