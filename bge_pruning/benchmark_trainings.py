"""The trainings that the benchmark compares: the same weights, loss and optimizer.

(a) transformers' model, (b) ours with gates, (c) ours with gates and a teacher in every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts
from bge_pruning.datasets.length_groups import group_batches
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.model_folder import compute_hf_config
from bge_pruning.models.objective import LossWeights, TeacherMap, distillation_parts
from bge_pruning.models.pretrained import BaseModel
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.optimization import l0_groups, weight_groups

PLAIN, GATES, TEACHER = "plain fine-tuning", "gates", "gates and teacher"
# How texts are put together: cut to one length; padded to the longest of a random batch; grouped.
FIXED, RANDOM, GROUPED = "fixed length", "random batches", "length groups"
LOSS = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)
LEARNING_RATE = 1e-5

# ``input_ids``, ``attention_mask`` (B, 1, T) and ``teacher_dense_vecs`` (B, 1, H).
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """A model and how one step trains it."""

    model: nn.Module
    step: Callable[[Batch], None]


def make_batches(
    texts: TokenizedTexts, batch_size: int, length: int, steps: int, pad: int, hidden: int
) -> dict[str, list[Batch]]:
    """Batches by kind; the random and the grouped ones are made of the same texts.

    Args:
        texts: Texts of mixed lengths.
        batch_size: Texts of a batch.
        length: Tokens of a text of fixed length.
        steps: Batches of each kind.
        pad: Id of the padding token.
        hidden: ``H``, for the vectors of a cached teacher, which are random.
    """
    lengths = texts.lengths[: batch_size * steps]
    kinds = {
        kind: [
            pad_texts([texts[i] for i in batch], pad)
            for batch in group_batches(lengths, batch_size, (0,), grouped=kind == GROUPED)
        ]
        for kind in (RANDOM, GROUPED)
    }
    real = texts.ids[texts.ids != pad]
    fixed = torch.from_numpy(np.resize(real, (steps, batch_size, length)).astype(np.int64))
    pairs = {FIXED: [(ids, torch.ones_like(ids)) for ids in fixed], **kinds}
    generator = torch.Generator().manual_seed(0)

    def batch(ids: Tensor, mask: Tensor) -> Batch:
        vectors = F.normalize(torch.randn(len(ids), hidden, generator=generator), dim=-1)
        return {
            "input_ids": ids[:, None],
            "attention_mask": mask[:, None],
            "teacher_dense_vecs": vectors[:, None],
        }

    return {kind: [batch(*pair) for pair in rows] for kind, rows in pairs.items()}


def make_trainings(base: BaseModel, device: str, autocast: bool) -> dict[str, Training]:
    """All trainings, each on a copy of the model.

    Args:
        base: The model.
        device: Torch device.
        autocast: Run products in bfloat16.
    """
    teacher = FrozenEncoder(copy.deepcopy(base.backbone), copy.deepcopy(base.heads))
    models = {
        PLAIN: huggingface_model(base),
        GATES: _gated_model(base, None),
        TEACHER: _gated_model(base, teacher),
    }
    losses = {
        PLAIN: _plain_loss(models[PLAIN], base),
        GATES: _gated_loss(models[GATES]),
        TEACHER: _gated_loss(models[TEACHER], without="teacher_dense_vecs"),
    }
    return {
        name: Training(model, _step(model.to(device).train(), losses[name], device, autocast))
        for name, model in models.items()
    }


def huggingface_model(base: BaseModel) -> nn.Module:
    """The encoder as transformers' own model, without dropout.

    Args:
        base: The model; its weights are copied.
    """
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(**compute_hf_config(base.hf_config, base.shape))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # as ours
    model = XLMRobertaModel(config, add_pooling_layer=base.shape.pooler)
    model.load_state_dict(base.backbone.state_dict())
    if base.shape.pooler:
        model.pooler.requires_grad_(False)
    return model


def _gated_model(base: BaseModel, teacher: FrozenEncoder | None) -> ComposerBGEM3:
    """With gates on all four axes, half way to half of each."""
    gates = L0Module(base.shape, AXES, _half(base.shape), None, seed=0)
    gates.warmup_progress = 0.5
    copies = copy.deepcopy(base.backbone), copy.deepcopy(base.heads)
    return ComposerBGEM3(*copies, gates, LOSS, teacher)


def _half(shape: EncoderShape) -> EncoderShape:
    heads = max(1, shape.num_attention_heads // 2)
    return replace(
        shape,
        num_attention_heads=heads,
        hidden_size=heads * shape.head_dim,
        num_hidden_layers=max(1, shape.num_hidden_layers // 2),
        intermediate_size=max(1, shape.intermediate_size // 2),
    )


def _plain_loss(model: nn.Module, base: BaseModel) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs = {"dense_vecs": base.heads.dense_vecs(states, mask)}
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
