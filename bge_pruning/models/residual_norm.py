"""What ends each half of a layer: residual connection, LayerNorm with gates, gate of the layer.

These are sums and means, limited by memory. On a GPU they are compiled into a few kernels, which
read and write each tensor once or twice; operation by operation it would be a dozen times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.models.masked_layer_norm import masked_layer_norm
from bge_pruning.utils.devices import allow_compiled_forms, compile_failure

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
        y: Shape ``(N, H)``.
        residual: Same.
        norm: The LayerNorm.
        hidden_z: Gates of the hidden dimensions, shape ``(H,)``; ``None`` if all are open.
        skip: Input of the layer, shape ``(N, H)``; needed with ``layer_z`` alone.
        layer_z: Gate of the layer, a scalar: 0 gives ``skip`` exactly, 1 the LayerNorm exactly.

    Returns:
        Shape ``(N, H)``.
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
    """:func:`compute_residual_norm` compiled for any number of tokens, if torch can do that.

    Args:
        device: Type of device.
    """
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
    """:func:`compute_residual_norm` compiled for any number of tokens.

    Args:
        backend: See :func:`torch.compile`.
    """
    allow_compiled_forms()
    compiled = torch.compile(compute_residual_norm, backend=backend)

    def compute(*given: Any) -> Tensor:
        for value in given:
            if isinstance(value, Tensor) and value.ndim == 2:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(*given)

    return compute
