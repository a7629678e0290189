"""Shard the encoder's weights and their optimizer state over the ranks."""

from __future__ import annotations

import warnings

import torch
from composer.utils import FSDP2Config, dist, get_device
from composer.utils.parallelism import ParallelismConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from bge_pruning.config.schema import Config
from bge_pruning.models.bge_m3_backbone import Layer
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3


@torch.no_grad()
def copy_from_rank_zero(model: nn.Module, device: str | None) -> None:
    """Give every rank the numbers of rank 0: sharding would take a part of each rank's own."""
    if dist.get_world_size() == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        there = get_device(device).tensor_to_device(tensor.detach()).contiguous()
        dist.broadcast(there, src=0)
        tensor.copy_(there)


def build_parallelism(config: Config, model: ComposerBGEM3) -> ParallelismConfig | None:
    """Configure how the trainer shards the model; ``None`` keeps all of it on every rank.

    Layers are sharded one by one: one layer at a time is gathered. Gates, multipliers and a learned
    temperature stay whole on every rank: they are small, and their arithmetic needs all of them;
    see :class:`bge_pruning.algorithms.gradient_groups.MeanGradients`. A sharded model is moved to
    the device.
    """
    p = config.parallelism
    if not p.fsdp:
        return None
    # The trainer moves sharded parts only.
    get_device(config.device).module_to_device(model)
    for whole in (model.l0_module, model.temperature):
        if whole is not None:
            whole._fsdp_wrap = False
    model.backbone.fsdp_wrap_fn = lambda module: isinstance(module, Layer)
    with warnings.catch_warnings():
        # torch's interface is stable; Composer's may change with its pinned version.
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        sharded = FSDP2Config(
            reshard_after_forward=p.sharding == "full",
            state_dict_type=p.state_dict,
            # Weights stay float32 under autocast, so that the arithmetic is that of one rank.
            mixed_precision="FULL",
        )
    return ParallelismConfig(fsdp2=sharded)


def register_forward_methods(model: ComposerBGEM3) -> None:
    """Let the methods that are called in place of ``forward`` gather the weights too."""
    for module, name in ((model.backbone, "encode"), (model.heads, "outputs")):
        if isinstance(module, FSDPModule):
            register_fsdp_forward_method(module, name)


def measure_gradient_scale(device: str | None) -> float:
    """Measure a sharded gradient as a multiple of the mean over the ranks.

    torch asks the backend for means. NCCL computes means, but gloo, the backend of CPUs, sums.
    """
    ranks = dist.get_world_size()
    layer = get_device(device).module_to_device(nn.Linear(1, ranks, bias=False))
    fully_shard(layer)
    layer(torch.ones(1, 1, device=layer.weight.device)).sum().backward()  # 1 on every rank
    return float(layer.weight.grad.to_local().mean())
