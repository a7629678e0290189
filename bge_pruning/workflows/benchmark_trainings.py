"""The trainings that the benchmark compares: the same weights, loss and optimizer.

Plain fine-tuning trains transformers' model; the others ours, with gates: with the teacher's
vectors ready in the batch, compiled or not; with a teacher that embeds every batch; or with vectors
from its cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bge_pruning.model_io.model_folder import compute_hf_config
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights, TeacherMap, distillation_parts
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.reports.training_cost import CACHED, COMPILED, PLAIN, TEACHER, UNCOMPILED
from bge_pruning.training.optimization import l0_groups, weight_groups
from bge_pruning.workflows.benchmark_batches import Batch

LOSS = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Training:
    """A model and how one step trains it.

    Attributes:
        model: What is trained.
        step: From a batch on the device to changed weights.
        cached: Whether its batches are made with vectors from the teacher's cache.
    """

    model: nn.Module
    step: Callable[[Batch], None]
    cached: bool


def make_trainings(
    base: BaseModel, device: str, autocast: bool, names: Sequence[str] = UNCOMPILED
) -> dict[str, Training]:
    """Trainings by name, each with weights of its own.

    Args:
        base: The model; the last training takes over its weights, so that they are not in memory
            twice, and it must not be used any more.
        device: Torch device.
        autocast: Run products in bfloat16.
        names: Which trainings.
    """
    trainings = {}
    for name in names:
        own = base if name == names[-1] else copy.deepcopy(base)
        if name == PLAIN:
            model = huggingface_model(own)
            loss = _plain_loss(model, own.heads)
        else:
            model = _gated_model(own, with_teacher=name == TEACHER)
            loss = _gated_loss(model, without="teacher_dense_vecs" if name == TEACHER else "")
        if name == COMPILED:
            model.backbone.compile_encoder(training=True)
        step = _step(model.to(device).train(), loss, device, autocast)
        trainings[name] = Training(model, step, cached=name == CACHED)
    return trainings


def huggingface_model(base: BaseModel) -> nn.Module:
    """The encoder as transformers' own model, without dropout.

    Args:
        base: The model; its weights are taken over, not copied.
    """
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(**compute_hf_config(base.hf_config, base.shape))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # as ours
    model = XLMRobertaModel(config, add_pooling_layer=base.shape.pooler)
    model.load_state_dict(base.backbone.state_dict(), assign=True)
    if base.shape.pooler:
        model.pooler.requires_grad_(False)
    return model


def _gated_model(base: BaseModel, with_teacher: bool) -> ComposerBGEM3:
    """With gates on all four axes, half way to half of each."""
    frozen = copy.deepcopy((base.backbone, base.heads)) if with_teacher else None
    teacher = FrozenEncoder(*frozen) if frozen else None
    gates = L0Module(base.shape, AXES, _half(base.shape), None, seed=0)
    gates.warmup_progress = 0.5
    return ComposerBGEM3(base.backbone, base.heads, gates, LOSS, teacher)


def _half(shape: EncoderShape) -> EncoderShape:
    heads = max(1, shape.num_attention_heads // 2)
    return replace(
        shape,
        num_attention_heads=heads,
        hidden_size=heads * shape.head_dim,
        num_hidden_layers=max(1, shape.num_hidden_layers // 2),
        intermediate_size=max(1, shape.intermediate_size // 2),
    )


def _plain_loss(model: nn.Module, heads: EmbeddingHeads) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs = {"dense_vecs": heads.dense_vecs(states, mask)}
        targets = {"dense_vecs": batch["teacher_dense_vecs"].flatten(0, 1)}
        return sum(distillation_parts(LOSS, outputs, targets, batch, TeacherMap(), ()).values())

    return loss


def _gated_loss(model: ComposerBGEM3, without: str = "") -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        given = {name: value for name, value in batch.items() if name != without}
        return model.loss(model(given), given)["total"]

    return loss


def _step(
    model: nn.Module, loss: Callable[[Batch], Tensor], device: str, autocast: bool
) -> Callable[[Batch], None]:
    gates = getattr(model, "l0_module", None)
    optimizer = torch.optim.AdamW(_groups(model, gates), lr=LEARNING_RATE, fused=True)

    def step(batch: Batch) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if gates is not None:
            gates.clamp_()
            gates.step += 1

    return step


def _groups(model: nn.Module, gates: L0Module | None) -> Sequence[dict[str, Any]]:
    if gates is None:
        return weight_groups([model], LEARNING_RATE, 0.01)
    weights = weight_groups([model.backbone, model.heads], LEARNING_RATE, 0.01)
    return weights + l0_groups(gates, l0_lr=0.1, lagrangian_lr=0.02, lambda_2_lr=1.0)
