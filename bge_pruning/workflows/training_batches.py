"""Batches and trainings that the training benchmark compares.

A training with ``data.num_workers`` 0, the default, reads the rows of a batch, pads them and moves
them to the device between two steps; here this is part of the step, and timed on its own as well.

Plain fine-tuning trains transformers' model; the others train ours with gates: with the teacher's
vectors ready in the batch, compiled or not; with a teacher that embeds every batch; or with vectors
from the teacher's cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.algorithms.row_updates import AdamW
from bge_pruning.datasets.embedding_dataset import Collator, EmbeddingDataset, TokenizedTexts
from bge_pruning.datasets.mixed_dataloader import group_batches
from bge_pruning.datasets.teacher_vectors import TeacherCache
from bge_pruning.model_io.model_folder import compute_hf_config
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights, TeacherMap, distillation_parts
from bge_pruning.models.packing import to_device
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.reports.efficiency_table import USUAL
from bge_pruning.training.optimization import l0_groups, weight_groups
from bge_pruning.utils.records import CACHED, COMPILED, FROZEN, PLAIN, TEACHER, WHOLE

# How texts form batches: cut to one length; padded to the longest of a random batch; grouped.
FIXED, RANDOM, GROUPED = "fixed length", "random batches", "length groups"
# ``input_ids``, ``attention_mask`` (B, 1, T), ``teacher_dense_vecs`` (B, 1, H); ``lengths``.
Batch = dict[str, "Tensor | list[list[int]]"]
Loss = Callable[[Batch], Tensor]
LOSS = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class TextBatches:
    """Batches of one kind.

    Attributes:
        rows: Texts of every batch, shape ``(steps, B)``.
        cached: The texts with the teacher's vectors as a training with ``teacher.cache`` gets
            them: a mapped file of all vectors. The system keeps this file in memory, as it does
            wherever the cache fits; larger caches are not measured.
        targets: The same vectors of every batch on the device, each ``(B, 1, H)``.
    """

    rows: np.ndarray
    plain: EmbeddingDataset
    cached: EmbeddingDataset
    targets: list[Tensor]
    pad_token_id: int
    device: str

    def make(self, index: int, cached: bool) -> Batch:
        """Make a batch on the device.

        If it is ``cached``, the teacher's vectors are found in the file, copied by the collator and
        moved; otherwise they are on the device already.
        """
        dataset = self.cached if cached else self.plain
        batch = Collator(self.pad_token_id)([dataset[row] for row in self.rows[index].tolist()])
        moved = {name: _move(value, self.device) for name, value in batch.items()}
        return moved if cached else {**moved, "teacher_dense_vecs": self.targets[index]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text of every batch, shape ``(steps, B)``."""
        return self.plain.lengths[self.rows]

    @property
    def padded(self) -> np.ndarray:
        """Tokens of every batch with padding, shape ``(steps,)``."""
        return self.lengths.max(axis=1) * self.rows.shape[1]


def make_batches(
    texts: TokenizedTexts,
    batch_size: int,
    length: int,
    steps: int,
    pad_token_id: int,
    hidden: int,
    folder: Path,
    device: str = "cpu",
) -> dict[str, TextBatches]:
    """Make batches by kind; the random and the grouped ones consist of the same texts.

    Texts of fixed length have ``length`` tokens. The teacher's vectors, of size ``hidden``, are
    random; their file is written into the folder.

    Raises:
        ValueError: If there are too few texts.
    """
    count = batch_size * steps
    if len(texts) < count:
        raise ValueError(
            f"{len(texts)} texts are too few for {steps} batches of {batch_size}. To fix, give "
            f"more texts, or lower --steps or --batch-size."
        )
    tokens = np.resize(texts.ids[texts.ids != pad_token_id], count * length)
    cut = TokenizedTexts(tokens, length * np.arange(count + 1), 0)
    lengths = texts.lengths[:count]
    kinds = {
        FIXED: (cut, np.arange(count).reshape(steps, -1)),
        RANDOM: (texts, group_batches(lengths, batch_size, (0,), grouped=False)),
        GROUPED: (texts, group_batches(lengths, batch_size, (0,))),
    }
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(len(texts), hidden, generator=generator), dim=-1)
    teacher = TeacherCache(texts, folder / "teacher", ("dense_vecs",))
    teacher.add(np.arange(len(texts)), {"dense_vecs": vectors.numpy()})
    examples = np.arange(len(texts))[:, None]
    return {
        kind: TextBatches(
            rows=rows,
            plain=EmbeddingDataset(kept, examples[: len(kept)]),
            cached=EmbeddingDataset(kept, examples[: len(kept)], teacher=teacher),
            targets=[_move(vectors[row][:, None], device) for row in rows],
            pad_token_id=pad_token_id,
            device=device,
        )
        for kind, (kept, rows) in kinds.items()
    }


def _move(value: Tensor | list[list[int]], device: str) -> Tensor | list[list[int]]:
    """Move to the device as the trainer does: to a GPU from pinned memory, without waiting."""
    return to_device(value, torch.device(device)) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Training:
    """A model, and a step from a batch on the device to changed weights.

    The batches are made with vectors from the teacher's cache if it is ``cached``.
    """

    model: nn.Module
    step: Callable[[Batch], None]
    cached: bool


def make_trainings(
    base: BaseModel, device: str, autocast: bool, names: Sequence[str] = USUAL
) -> dict[str, Training]:
    """Make trainings by name, each with weights of its own.

    The last one takes over the weights of ``base``, so that they are not in memory twice: do not
    use it afterwards. With ``autocast`` products run in bfloat16.
    """
    trainings = {}
    for name in names:
        own = base if name == names[-1] else copy.deepcopy(base)
        model, loss = _plain(own) if name == PLAIN else _gated(own, name == TEACHER)
        if name == COMPILED:
            model.backbone.compile_encoder(training=True)
        if name == FROZEN:
            model.backbone.embeddings.freeze_tables()
        if name not in (PLAIN, WHOLE):
            model.update_drawn_rows()
        step = _step(model.to(device).train(), loss, device, autocast)
        trainings[name] = Training(model, step, cached=name == CACHED)
    return trainings


def huggingface_model(base: BaseModel) -> nn.Module:
    """Return the encoder as transformers' own model, without dropout; it takes over the weights."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(**compute_hf_config(base.hf_config, base.shape))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # as ours
    model = XLMRobertaModel(config, add_pooling_layer=base.shape.pooler)
    model.load_state_dict(base.backbone.state_dict(), assign=True)
    if base.shape.pooler:
        model.pooler.requires_grad_(False)
    return model


def _plain(base: BaseModel) -> tuple[nn.Module, Loss]:
    model = huggingface_model(base)

    def loss(batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs = {"dense_vecs": base.heads.dense_vecs(states, mask)}
        targets = {"dense_vecs": batch["teacher_dense_vecs"].flatten(0, 1)}
        return sum(distillation_parts(LOSS, outputs, targets, batch, TeacherMap(), ()).values())

    return model, loss


def _gated(base: BaseModel, with_teacher: bool) -> tuple[nn.Module, Loss]:
    """With gates on all four axes, half way to half of each."""
    copied = copy.deepcopy((base.backbone, base.heads)) if with_teacher else None
    teacher = FrozenEncoder(*copied) if copied else None
    gates = L0Module(base.shape, AXES, _half(base.shape), None, seed=0)
    gates.warmup_progress = 0.5
    model = ComposerBGEM3(base.backbone, base.heads, gates, LOSS, teacher)

    def loss(batch: Batch) -> Tensor:
        ignored = "teacher_dense_vecs" if with_teacher else None
        given = {name: value for name, value in batch.items() if name != ignored}
        return model.loss(model(given), given)["total"]

    return model, loss


def _half(shape: EncoderShape) -> EncoderShape:
    axes = ("num_attention_heads", "num_hidden_layers", "intermediate_size")
    sizes = {name: max(1, getattr(shape, name) // 2) for name in axes}
    return replace(shape, **sizes, hidden_size=sizes["num_attention_heads"] * shape.head_dim)


def _step(model: nn.Module, loss: Loss, device: str, autocast: bool) -> Callable[[Batch], None]:
    gates = getattr(model, "l0_module", None)
    modules = [model] if gates is None else [model.backbone, model.heads]
    groups = list(weight_groups(modules, LEARNING_RATE, 0.01))
    if gates is not None:
        groups += l0_groups(gates, l0_lr=0.1, lagrangian_lr=0.02, lambda_2_lr=1.0)
    tables = [] if gates is None else model.row_tables()
    optimizer = AdamW(groups, tables, lr=LEARNING_RATE, fused=True)

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
