"""The ComposerModel: encoder, heads and gates under one roof; no arithmetic of its own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric, SpearmanCorrCoef

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.losses import (
    distillation_alignment,
    distillation_similarity,
    scatter_to_teacher_space,
    sts_regression,
)
from bge_pruning.models.teacher import FrozenEncoder

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss; a part of weight 0 is not computed."""

    sts_regression: float = 0.0
    distillation_alignment: float = 0.0
    distillation_similarity: float = 0.0
    similarity_temperature: float = 0.05

    @property
    def distils(self) -> bool:
        """Whether any part needs the teacher's vectors."""
        return self.distillation_alignment > 0 or self.distillation_similarity > 0


class ComposerBGEM3(ComposerModel):
    """An embedding model that is pruned while it is trained.

    A batch holds ``input_ids`` and ``attention_mask`` of shape ``(B, N, T)`` (N texts per
    example), and optionally ``scores`` ``(B,)`` in [0, 1] for sentence pairs and
    ``teacher_dense_vecs`` ``(B, N, Ht)``.

    Args:
        backbone: The encoder.
        heads: The output heads.
        l0_module: The gates; ``None`` trains the model as it is.
        loss_weights: What to optimise.
        teacher: Frozen model that embeds a batch's texts when the batch has no
            ``teacher_dense_vecs``; called with token ids and mask of shape ``(B * N, T)``.
        teacher_dimensions: Dimensions of the teacher that an extracted student has kept, shape
            ``(H,)``; ``None`` if the spaces are the same.
        eval_target_model: See :meth:`L0Module.deterministic_masks`.
    """

    def __init__(
        self,
        backbone: XLMRobertaBackbone,
        heads: EmbeddingHeads,
        l0_module: L0Module | None,
        loss_weights: LossWeights,
        teacher: FrozenEncoder | None = None,
        teacher_dimensions: Tensor | None = None,
        eval_target_model: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.l0_module = l0_module
        self.loss_weights = loss_weights
        self.eval_target_model = eval_target_model
        # In a tuple, so that it is neither trained, nor wrapped by DDP, nor checkpointed.
        self._teacher = (teacher,)
        self.register_buffer("teacher_dimensions", teacher_dimensions, persistent=False)
        # This objective trains the dense output: no gradient reaches the other heads.
        self.heads.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Dense vectors, shape ``(B, N, H)``."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        masks = None if self.l0_module is None else self._masks()
        hidden = self.backbone(ids.flatten(0, 1), mask.flatten(0, 1), masks)
        dense = self.heads.dense_vecs(hidden, mask.flatten(0, 1))
        return {"dense_vecs": dense.unflatten(0, ids.shape[:2])}

    def _masks(self) -> Any:
        if self.training:
            return self.l0_module.sample_masks()
        return self.l0_module.deterministic_masks(at_target=self.eval_target_model)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Weighted parts of the loss by name, and their ``total``."""
        weights = self.loss_weights
        parts: dict[str, Tensor] = {}
        if weights.sts_regression and "scores" in batch:
            first, second = outputs["dense_vecs"].unbind(1)
            parts["sts_regression"] = sts_regression(first, second, batch["scores"])
        if weights.distils:
            parts.update(self._distillation(outputs["dense_vecs"].flatten(0, 1), batch))
        terms = [getattr(weights, name) * value for name, value in parts.items()]
        if self.l0_module is not None:
            parts["lagrangian"] = self.l0_module.lagrangian()
            terms.append(parts["lagrangian"])
        return {**parts, "total": torch.stack(terms).sum()}

    def _distillation(self, vectors: Tensor, batch: Batch) -> dict[str, Tensor]:
        weights, target = self.loss_weights, self._teacher_vecs(batch)
        parts = {}
        if weights.distillation_alignment:
            student = scatter_to_teacher_space(vectors, self.teacher_dimensions, target.shape[1])
            parts["distillation_alignment"] = distillation_alignment(student, target)
        if weights.distillation_similarity:
            all_student, all_target, own = gather_batch(vectors, target)
            parts["distillation_similarity"] = distillation_similarity(
                vectors, target, all_student, all_target, own, weights.similarity_temperature
            )
        return parts

    def _teacher_vecs(self, batch: Batch) -> Tensor:
        if "teacher_dense_vecs" in batch:
            return batch["teacher_dense_vecs"].flatten(0, 1)
        return self._teacher[0](
            batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
        )

    def eval_forward(self, batch: Batch, outputs: dict[str, Tensor] | None = None) -> Tensor:
        """Cosine similarity of sentence pairs, shape ``(B,)``, with the deterministic gates."""
        outputs = outputs if outputs is not None else self.forward(batch)
        first, second = outputs["dense_vecs"].unbind(1)
        return (first * second).sum(-1)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Spearman correlation over the whole evaluation split."""
        if is_train:
            return {}
        with warnings.catch_warnings():
            # It keeps all values of the split, which is what a rank correlation needs.
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all")
            return {"cosine_spearman": SpearmanCorrCoef()}

    def update_metric(self, batch: Batch, outputs: Tensor, metric: Metric) -> None:
        """Add a batch's similarities and gold scores.

        Raises:
            ValueError: If a similarity is not finite: ranked as it comes, it could score well.
        """
        if broken := int((~outputs.isfinite()).sum()):
            raise ValueError(
                f"{broken} of {outputs.numel()} similarities are not finite: the weights are "
                f"broken. To fix, use an earlier checkpoint and lower optimizer.lr."
            )
        metric.update(outputs.float(), batch["scores"].float())


def gather_batch(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The texts of all ranks, with gradient to the rank that each text came from.

    Args:
        student: This rank's vectors, shape ``(B, Hs)``.
        teacher: This rank's target vectors, shape ``(B, Ht)``.

    Returns:
        All student vectors ``(W * B, Hs)``, all target vectors ``(W * B, Ht)``, and the column of
        each of this rank's texts, shape ``(B,)``.
    """
    own = torch.arange(student.shape[0], device=student.device)
    if dist.get_world_size() == 1:
        return student, teacher, own
    from torch.distributed.nn.functional import all_gather

    own = own + dist.get_global_rank() * student.shape[0]
    return torch.cat(all_gather(student)), torch.cat(dist.all_gather(teacher)), own
