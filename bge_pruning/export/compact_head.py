"""A multi-vector head as wide as the hidden size, with the same scores.

FlagEmbedding (without ``colbert_dim``) and vLLM read a multi-vector head of size ``(H, H)``, but
pruning the hidden size keeps the head's output size ``C > H``. Its vectors do not need that many
dimensions: what goes in is the output of a LayerNorm, ``h = gamma * n + beta`` with ``n`` of mean
0, so what comes out, ``W h + b``, is spanned by the ``H - 1`` directions of ``W diag(gamma) n`` and
the one vector ``W beta + b``: ``H`` in all, the bias included. In an orthonormal basis ``Q`` of
that span, ``Q^T (W h + b)`` has the same lengths and products, up to rounding.

A head of ``C < H`` outputs gets outputs that are always 0, which changes no length and no product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def compute_span(head: nn.Linear, norm: nn.LayerNorm) -> Tensor:
    """Basis of all that a head can compute from a LayerNorm's output, float64, ``(C, H)``."""
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    hidden = head.in_features
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    # Columns 1 to H - 1 of this reflection are orthonormal and have mean 0.
    centred = _reflection(hidden)[:, 1:]
    moving = (weight * gamma) @ centred
    fixed = weight @ beta + bias
    basis, _ = torch.linalg.qr(torch.cat([moving, fixed[:, None]], dim=1))
    return basis


def _reflection(size: int) -> Tensor:
    """Householder reflection whose first column is the direction ``(1, ..., 1)``."""
    direction = torch.full((size,), size**-0.5, dtype=torch.float64)
    direction[0] += 1.0
    direction /= direction.norm()
    return torch.eye(size, dtype=torch.float64) - 2.0 * torch.outer(direction, direction)


@torch.no_grad()
def square_head(head: nn.Linear, norm: nn.LayerNorm) -> nn.Linear:
    """A head of size ``(H, H)`` whose vectors have the lengths and products of the given head's."""
    square = nn.Linear(head.in_features, head.in_features, dtype=head.weight.dtype)
    missing = head.in_features - head.out_features
    if missing > 0:
        square.weight.copy_(pad(head.weight, (0, 0, 0, missing)))
        square.bias.copy_(pad(head.bias, (0, missing)))
    else:
        basis = compute_span(head, norm)
        square.weight.copy_(basis.T @ head.weight.double())
        square.bias.copy_(basis.T @ head.bias.double())
    return square.requires_grad_(head.weight.requires_grad)
