"""Fully sharded training: each rank holds a part of the encoder's weights and optimizer state."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from composer.utils import FSDP2Config, dist, get_device
from composer.utils.parallelism import ParallelismConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.models.bge_m3_backbone import Layer
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.training.data_builders import build_loss_weights


def check_sharding(config: Config) -> None:
    """Refuse what a sharded model cannot do.

    Raises:
        ConfigError: If the batch would be embedded in pieces by cached gradients.
    """
    # They embed a piece again in the middle of the backward pass, when its weights are not there.
    in_pieces = config.device_train_microbatch_size is not None
    if config.parallelism.fsdp and in_pieces and build_loss_weights(config).compares_texts:
        raise ConfigError(
            "parallelism.fsdp does not work with device_train_microbatch_size where the loss "
            "compares the texts of a batch. To fix, leave it out and set "
            "model.activation_checkpointing=true, which needs less memory too."
        )


def check_kind(config: Config, checkpoint: Path | None) -> None:
    """Refuse to go on from a checkpoint of the other kind than the run would write.

    Args:
        config: The run.
        checkpoint: Its newest one, if it has any.

    Raises:
        ConfigError: If one is a file and the other a folder.
    """
    if checkpoint is None:
        return
    kind = "sharded" if checkpoint.is_dir() else "full"
    if kind != config.parallelism.state_dict:
        also = " and parallelism.fsdp=true" if kind == "sharded" else ""
        raise ConfigError(
            f"{checkpoint} is a {kind} checkpoint, and the configuration says "
            f"{config.parallelism.state_dict}. To fix, set parallelism.state_dict={kind}{also}."
        )


def build_parallelism(config: Config, model: ComposerBGEM3) -> ParallelismConfig | None:
    """How the trainer shards the model; ``None`` keeps all of it on every rank.

    Layers are sharded one by one: the weights of one at a time are whole. Gates, multipliers and
    a learned temperature stay whole on every rank: they are small, and their arithmetic needs all
    of them; see :class:`bge_pruning.algorithms.gradient_groups.MeanGradients`.

    Args:
        config: The run.
        model: Its model, which is moved to the device.
    """
    p = config.parallelism
    if not p.fsdp:
        return None
    # The trainer moves only what it shards.
    get_device(config.device).module_to_device(model)
    for whole in (model.l0_module, model.temperature):
        if whole is not None:
            whole._fsdp_wrap = False
    model.backbone.fsdp_wrap_fn = is_sharded_apart
    with warnings.catch_warnings():
        # torch's interface is stable; Composer's may change with its pinned version.
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        sharded = FSDP2Config(
            reshard_after_forward=p.sharding == "full",
            state_dict_type=p.state_dict,
            # Weights stay float32 and autocast does the rest: the arithmetic is that of one rank.
            mixed_precision="FULL",
        )
    return ParallelismConfig(fsdp2=sharded)


def is_sharded_apart(module: nn.Module) -> bool:
    """Whether a part of the encoder is gathered on its own: a layer."""
    return isinstance(module, Layer)


def register_forward_methods(model: ComposerBGEM3) -> None:
    """Let the methods that are called instead of ``forward`` gather the weights too.

    Args:
        model: After the trainer has sharded it.
    """
    for module, name in ((model.backbone, "encode"), (model.heads, "outputs")):
        if isinstance(module, FSDPModule):
            register_fsdp_forward_method(module, name)


def measure_gradient_scale(device: str | None) -> float:
    """What a sharded gradient is, as a multiple of the mean over the ranks.

    torch asks the backend for means. NCCL gives them; gloo, which a CPU has, gave sums.

    Args:
        device: ``cpu`` or ``gpu``; ``None`` for a GPU if there is one.
    """
    ranks = dist.get_world_size()
    layer = get_device(device).module_to_device(nn.Linear(1, ranks, bias=False))
    fully_shard(layer)
    layer(torch.ones(1, 1, device=layer.weight.device)).sum().backward()  # 1 on every rank
    return float(layer.weight.grad.to_local().mean())
