"""Build the optimizer with its groups of parameters, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer import optim
from torch import nn

from bge_pruning.algorithms.row_updates import AdamW
from bge_pruning.config.load import Config
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.l0_module_embedding import L0Module


def build_optimizer(config: Config, model: ComposerBGEM3) -> AdamW:
    """Build AdamW with groups for weights, gates and multipliers; the multipliers ascend."""
    o = config.optimizer
    groups = weight_groups([model.backbone, model.heads], o.lr, o.weight_decay)
    if model.temperature is not None:
        # The temperature has its own group: it is whole where the others are sharded.
        alone = {"params": list(model.temperature.parameters()), "lr": o.lr, "weight_decay": 0.0}
        groups.append({"name": "weights/temperature", **alone})
    if model.l0_module is not None:
        groups += l0_groups(model.l0_module, o.l0_lr, o.lagrangian_lr, o.lambda_2_lr)
    options = {"lr": o.lr, "betas": tuple(o.betas), "eps": o.eps}
    return AdamW(groups, model.row_tables(), fused=True, **options)


def weight_groups(
    modules: Sequence[nn.Module], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Group matrices with weight decay, and biases, LayerNorms and embeddings without.

    Decay on the embeddings would shrink the rows of tokens that the data do not contain.
    """
    decay, rest = [], []
    for name, parameter in (p for module in modules for p in module.named_parameters()):
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not name.startswith("embeddings.")
            (decay if matrix else rest).append(parameter)
    return [
        {"name": "weights/decay", "params": decay, "lr": lr, "weight_decay": weight_decay},
        {"name": "weights/no_decay", "params": rest, "lr": lr, "weight_decay": 0.0},
    ]


def l0_groups(
    l0_module: L0Module, l0_lr: float, lagrangian_lr: float, lambda_2_lr: float
) -> list[dict[str, Any]]:
    """Group gates for descent and multipliers for ascent, all without decay."""
    multipliers = {"weight_decay": 0.0, "maximize": True}
    groups = (
        ("gates", l0_module.log_alpha, l0_lr, {"weight_decay": 0.0}),
        ("multipliers/lambda_1", l0_module.lambda_1, lagrangian_lr, multipliers),
        ("multipliers/lambda_2", l0_module.lambda_2, lambda_2_lr, multipliers),
    )
    return [
        {"name": name, "params": list(part.parameters()), "lr": lr, **rest}
        for name, part, lr, rest in groups
    ]


def build_scheduler(config: Config) -> optim.ComposerScheduler:
    """Build the learning-rate schedule: one factor of at least 0 for all groups."""
    s = config.scheduler
    if s.name == "constant":
        return optim.ConstantWithWarmupScheduler(t_warmup=s.t_warmup)
    kinds = {
        "linear": optim.LinearWithWarmupScheduler,
        "cosine": optim.CosineAnnealingWithWarmupScheduler,
    }
    return kinds[s.name](t_warmup=s.t_warmup, alpha_f=s.alpha_f)
