"""Linear layers fitted to inputs and wanted outputs, and which inputs they can best do without.

With inputs ``X`` (a column of ones for the bias included), wanted outputs ``Y`` and present weights
``W_0``, the fit is ridge regression around the present weights,

``W = argmin ||X W - Y||^2 + r ||W - W_0||^2``, ``r = ridge * mean(diag(X^T X))``.

All of it follows from ``X^T X`` and ``X^T Y``, which are sums over tokens.

With ``C = (X^T X)^-1``, removing the group ``g`` of inputs and fitting the others again (the
optimal brain surgeon, Hassibi and Stork, 1993; for groups, ZipLM, arXiv:2302.04089)

* raises the squared error by ``tr(W_g^T C_gg^-1 W_g)``, which is ``w^2 / C_ii`` for a single input,
* changes the other weights to ``W - C_:g C_gg^-1 W_g``,
* and changes their inverse to ``C - C_:g C_gg^-1 C_g:``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# For a fit: with less, texts unlike those of the fit come out worse.
RIDGE = 0.1
# For an order of elimination, where no weight is kept: just enough to invert.
ORDER_RIDGE = 1e-3
# Single inputs are removed in blocks of this share of those left: one by one takes many times as
# long, and the order hardly differs.
BLOCK = 1 / 32


class Moments:
    """``X^T X`` and ``X^T Y``: products of a batch in its own precision, summed in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        options = {"dtype": torch.float64, "device": device}
        self.xx = torch.zeros(inputs + 1, inputs + 1, **options)
        self.xy = torch.zeros(inputs + 1, outputs, **options)

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: inputs ``(N, I)``, wanted outputs ``(N, O)``, and their weights ``(N,)``."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        weighted = (x * weights.to(x)[:, None]).T
        self.xx += weighted @ x
        self.xy += weighted @ y


def joined(linear: nn.Linear) -> Tensor:
    """Weights and bias of a linear layer as one matrix, float64, shape ``(I + 1, O)``."""
    return torch.cat([linear.weight, linear.bias[:, None]], dim=1).detach().double().T


@torch.no_grad()
def fit_(linear: nn.Linear, moments: Moments, ridge: float = RIDGE) -> None:
    """Fit a linear layer with a bias in place, to moments of its inputs and wanted outputs.

    The ridge holds the weights where they are, relative to the mean square of an input.
    """
    before = joined(linear)
    error = moments.xy - moments.xx @ before
    if not bool(torch.isfinite(error).all()):
        raise ValueError(
            "activations of the model or of its teacher are not finite. To fix, check the weights "
            "of both, or set teacher.refit_texts=0."
        )
    fitted = before + torch.linalg.solve(_damped(moments.xx, ridge), error)
    linear.weight.copy_(fitted[:-1].T)
    linear.bias.copy_(fitted[-1])


def _damped(xx: Tensor, ridge: float) -> Tensor:
    # At least something on the diagonal: inputs may all be 0.
    damping = (ridge * xx.diagonal().mean()).clamp(min=torch.finfo(xx.dtype).tiny ** 0.5)
    return xx + damping * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)


@torch.no_grad()
def elimination_order(
    xx: Tensor, weight: Tensor, group: int = 1, ridge: float = ORDER_RIDGE
) -> Tensor:
    """Groups of inputs in the order in which a linear layer can best do without them, on the CPU.

    Each round removes the groups that raise the squared error of the outputs least when all other
    weights are fitted again: one group, or a few where groups are single inputs (see
    :func:`_block`). Rows and columns of removed inputs are cut away, so indices count what is left.

    Args:
        xx: ``X^T X``, a column of ones included, shape ``(I + 1, I + 1)``.
        weight: See :func:`joined`, shape ``(I + 1, O)``.
        group: Number of inputs of a group, which are next to each other.
    """
    inverse = torch.linalg.inv(_damped(xx, ridge))
    weight = weight.clone()
    alive = torch.arange((len(xx) - 1) // group, device=xx.device)
    order = []
    while len(alive):
        rows = _rows(torch.arange(len(alive), device=xx.device), group)
        blocks = torch.stack([inverse[r][:, r] for r in rows]) if group > 1 else None
        costs = _costs(inverse, weight, rows, blocks)
        going = costs.argmin()[None] if group > 1 else _block(inverse, weight, costs)
        order.append(alive[going])
        gone = rows[going].flatten()
        stay = torch.ones(len(inverse), dtype=torch.bool, device=xx.device)
        stay[gone] = False
        solved = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight = (weight - solved.T @ weight[gone])[stay]
        inverse = (inverse - inverse[:, gone] @ solved)[stay][:, stay]
        alive = alive[stay[rows[:, 0]]]
    return torch.cat(order).cpu()


def _block(inverse: Tensor, weight: Tensor, costs: Tensor) -> Tensor:
    """Single inputs that go together, each the cheapest once those before it are gone.

    Of two that are alike each is cheap, but only while the other is there. So the cheapest are
    removed one after the other among themselves, until some other input may be cheaper.
    """
    count = max(1, int(len(costs) * BLOCK))
    order = costs.argsort(stable=True)
    near, others = order[: 2 * count], order[2 * count :]
    limit = costs[others[0]] if len(others) else float("inf")
    inverse, weight = inverse[near][:, near], weight[near]
    gone = torch.zeros(len(near), dtype=torch.bool, device=near.device)
    going: list[Tensor] = []
    for _ in range(count):
        costs = (weight.square().sum(1) / inverse.diagonal()).masked_fill(gone, float("inf"))
        best = costs.argmin()
        if going and costs[best] > limit:
            break
        going.append(near[best])
        gone[best] = True
        column = (inverse[:, best] / inverse[best, best])[:, None]
        weight = weight - column * weight[best]
        inverse = inverse - column * inverse[best]
    return torch.stack(going)


def _rows(groups: Tensor, size: int) -> Tensor:
    """Inputs of each group, shape ``(groups, size)``."""
    return groups[:, None] * size + torch.arange(size, device=groups.device)


def _costs(inverse: Tensor, weight: Tensor, rows: Tensor, blocks: Tensor | None) -> Tensor:
    """``tr(W_g^T C_gg^-1 W_g)`` of each group, by which the squared error rises without it."""
    if blocks is None:
        return weight[rows[:, 0]].square().sum(1) / inverse.diagonal()[rows[:, 0]]
    own = weight[rows]  # (groups, size, O)
    return (own * torch.linalg.solve(blocks, own)).sum((1, 2))
