"""LayerNorm over the dimensions whose gates are open, and the residual sum before it.

Left to autograd, the formula takes a dozen passes over memory and keeps five tensors of the size of
its input; this keeps one, and a number for each token. It is limited by memory: on a GPU it is
compiled into a few kernels, which read and write each tensor once or twice.

The backward pass. With shares ``p = z / sum(z)`` and ``r = 1 / sqrt(var + eps)`` a token has

``mean = sum p u``, ``var = sum p (u - mean)^2``, ``x = (u - mean) r``, ``y = x w z + b z``.

Write ``G = dL/dx = dL/dy w z``, ``first = sum_h G`` and ``second = sum_h G x``. Then

* ``dL/dmean = -r first`` (the variance does not move with the mean: ``sum p (u - mean) = 0``),
* ``dL/dvar = -r^2 second / 2``,
* ``dL/du = r (G - p (x second + first))``,
* ``dL/dp = u dL/dmean + (u - mean)^2 dL/dvar = -x first - x^2 second / 2 - r mean first``.

The last term is the same for all ``h``. As the shares always sum to 1, ``dL/dz`` gets
``(dL/dp - sum_k p_k dL/dp_k) / sum(z)``, from which such a constant drops out: it is not computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.utils.environment import allow_compiled_forms, compile_failure


def masked_layer_norm(
    u: Tensor, weight: Tensor, bias: Tensor, eps: float, hidden_z: Tensor
) -> Tensor:
    """LayerNorm whose statistics are weighted by the hidden gates, shape ``(..., H)``.

    ``n = sum(z)``, ``mean = sum(z u) / n``, ``var = sum(z (u - mean)^2) / n`` and the output is
    ``((u - mean) / sqrt(var + eps) * weight + bias) * z``. With binary gates this is LayerNorm
    over the open dimensions and 0 elsewhere; with soft gates it is a smooth relaxation. The gates
    ``hidden_z``, ``(H,)`` in [0, 1], must not all be 0.

    Under autocast the statistics are float32, as in torch's own LayerNorm.
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
    spread = x * second
    d_share = _d_share_up_to_constant(x, spread, first)
    d_u = torch.addcmul(g * scale, spread.add_(first), share, value=-1.0).mul_(rstd)
    d_z = (d_share - d_share @ share) / size + d_scale * weight + d_shift * bias
    return d_u, d_scale, d_shift, d_z


def _d_share_up_to_constant(x: Tensor, spread: Tensor, first: Tensor) -> Tensor:
    """``-sum_N (x first + x^2 second / 2)`` with ``spread = x second``, see the module."""
    half = torch.add(first, spread, alpha=0.5)
    return -(x * half).reshape(-1, x.shape[-1]).sum(0)


log = logging.getLogger(__name__)


def residual_norm(
    y: Tensor,
    residual: Tensor,
    norm: nn.LayerNorm,
    hidden_z: Tensor | None = None,
    skip: Tensor | None = None,
    layer_z: Tensor | None = None,
) -> Tensor:
    """``LN(residual + y)`` over the open dimensions, mixed with ``skip`` by the gate of a layer.

    Args:
        y: Shape ``(N, H)``, as ``residual`` and the result.
        hidden_z: Gates of the hidden dimensions, shape ``(H,)``; ``None`` if all are open.
        skip: Input of the layer, shape ``(N, H)``; needed only with ``layer_z``.
        layer_z: Gate of the layer, a scalar: 0 gives ``skip`` exactly, 1 the LayerNorm exactly.
    """
    compute = compute_residual_norm
    gated = hidden_z is not None or layer_z is not None
    if gated and y.is_cuda and not torch.compiler.is_compiling():
        compute = fused(y.device.type)
    return compute(y, residual, norm.weight, norm.bias, norm.eps, hidden_z, skip, layer_z)


def compute_residual_norm(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hidden_z: Tensor | None,
    skip: Tensor | None,
    layer_z: Tensor | None,
) -> Tensor:
    """:func:`residual_norm`, operation by operation."""
    u = residual + y
    if hidden_z is None:
        normalised = F.layer_norm(u, weight.shape, weight, bias, eps)
    else:
        normalised = masked_layer_norm(u, weight, bias, eps, hidden_z)
    if layer_z is None:
        return normalised
    # torch.lerp returns its first argument exactly at 0 and its second exactly at 1.
    return torch.lerp(skip, normalised, layer_z.to(normalised.dtype))


@cache
def fused(device: str) -> Callable[..., Tensor]:
    """:func:`compute_residual_norm` compiled for a type of device, if torch can do that."""
    if reason := compile_failure(device):
        log.warning(
            "torch.compile does not work on %s (%s), so LayerNorms with gates run operation by "
            "operation and a step takes longer",
            device,
            reason,
        )
        return compute_residual_norm
    return compile_residual_norm("inductor")


def compile_residual_norm(backend: str | Callable) -> Callable[..., Tensor]:
    """:func:`compute_residual_norm` compiled for any number of tokens."""
    allow_compiled_forms()
    compiled = torch.compile(compute_residual_norm, backend=backend)

    def compute(*given: Any) -> Tensor:
        for value in given:
            if isinstance(value, Tensor) and value.ndim == 2:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(*given)

    return compute
