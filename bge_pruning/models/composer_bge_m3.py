"""The ComposerModel: encoder, heads and gates under one roof; no arithmetic of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric, SpearmanCorrCoef

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.gather import gather_rows
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.losses import (
    cosent,
    distillation_alignment,
    distillation_similarity,
    exclude_positives,
    info_nce,
    scatter_to_teacher_space,
    score_distillation,
    sts_regression,
    token_vector_distillation,
    token_weight_distillation,
    unified_loss,
)
from bge_pruning.models.scores import Outputs, compute_scores
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.models.temperature import LearnedTemperature

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss; a part of weight 0 is not computed."""

    sts_regression: float = 0.0
    cosent: float = 0.0
    distillation_alignment: float = 0.0
    distillation_similarity: float = 0.0
    distillation_sparse: float = 0.0
    distillation_colbert: float = 0.0
    similarity_temperature: float = 0.05
    contrastive: float = 0.0
    self_distillation: float = 0.0
    contrastive_outputs: tuple[str, ...] = ("dense",)
    temperature: float = 0.02
    learn_temperature: bool = False
    score_distillation: float = 0.0
    distillation_hidden: float = 0.0

    @property
    def distils(self) -> bool:
        """Whether any part needs the teacher's outputs."""
        return bool(self.distilled)

    @property
    def distilled(self) -> tuple[str, ...]:
        """Outputs of the teacher that the parts need."""
        needs = {
            "dense_vecs": self.distillation_alignment > 0 or self.distillation_similarity > 0,
            "token_weights": self.distillation_sparse > 0,
            "colbert_vecs": self.distillation_colbert > 0,
        }
        return tuple(name for name, needed in needs.items() if needed)

    @property
    def trained(self) -> tuple[str, ...]:
        """Outputs of the student that the parts need; the dense one always."""
        scored = self.contrastive > 0 or self.self_distillation > 0
        names = {"sparse": "token_weights", "colbert": "colbert_vecs"}
        compared = {names[n] for n in self.contrastive_outputs if n in names and scored}
        wanted = compared | set(self.distilled)
        return ("dense_vecs", *(name for name in names.values() if name in wanted))


class ComposerBGEM3(ComposerModel):
    """An embedding model that is pruned while it is trained.

    A batch holds ``input_ids`` and ``attention_mask`` of shape ``(B, N, T)`` (N texts per
    example), and optionally ``scores`` ``(B,)`` in [0, 1] for sentence pairs and the teacher's
    outputs, ``teacher_dense_vecs`` ``(B, N, Ht)``, ``teacher_token_weights`` ``(B, N, T)``,
    ``teacher_colbert_vecs`` ``(B, N, T - 1, C)``. Where the first text is a query and the others
    its passages, ``passage_texts`` ``(B, N - 1)`` numbers the passages and ``positive_texts``
    ``(B, K)`` the known positives of each query, padded with -1.

    Args:
        backbone: The encoder.
        heads: The output heads.
        l0_module: The gates; ``None`` trains the model as it is.
        loss_weights: What to optimise.
        teacher: Frozen model that embeds a batch's texts when the batch has no outputs of the
            teacher; called with token ids and mask of shape ``(B * N, T)``.
        teacher_dimensions: Dimensions of the teacher that an extracted student has kept, shape
            ``(H,)``; ``None`` if the spaces are the same.
        eval_target_model: See :meth:`L0Module.deterministic_masks`.
        special_ids: Token ids that carry no sparse weight (cls, eos, pad, unk).
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
        special_ids: Sequence[int] = (),
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
        self.special_ids = tuple(special_ids)
        learned = loss_weights.learn_temperature and loss_weights.contrastive > 0
        self.temperature = LearnedTemperature(loss_weights.temperature) if learned else None
        self._freeze_idle_heads()

    def _freeze_idle_heads(self) -> None:
        """No gradient reaches a head whose output is not in the loss: DDP would wait for it."""
        if missing := sorted(set(self.loss_weights.trained) - set(self.heads.names())):
            raise ValueError(
                f"the loss trains {', '.join(missing)}, and the model has no head for it. To fix, "
                f"use a base model with that head, set model.init_missing_heads=true, or set that "
                f"part of the loss to 0."
            )
        self.heads.requires_grad_(False)
        heads = {
            "token_weights": self.heads.sparse_linear,
            "colbert_vecs": self.heads.colbert_linear,
        }
        for name in self.loss_weights.trained:
            if heads.get(name) is not None:
                heads[name].requires_grad_(True)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs by name, shape ``(B, N, ...)``; in evaluation the dense vectors alone."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        masks = None if self.l0_module is None else self._masks()
        hidden = self.backbone(ids.flatten(0, 1), mask.flatten(0, 1), masks)
        names = self.loss_weights.trained if self.training else ("dense_vecs",)
        outputs = self.heads.outputs(hidden, mask.flatten(0, 1), names)
        return {name: value.unflatten(0, ids.shape[:2]) for name, value in outputs.items()}

    def _masks(self) -> Any:
        if self.training:
            return self.l0_module.sample_masks()
        return self.l0_module.deterministic_masks(at_target=self.eval_target_model)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Weighted parts of the loss by name, and their ``total``."""
        weights = self.loss_weights
        parts: dict[str, Tensor] = {}
        if "scores" in batch:
            parts.update(self._pair_losses(outputs["dense_vecs"], batch["scores"]))
        if "passage_texts" in batch and (weights.contrastive or weights.self_distillation):
            parts.update(self._contrastive(outputs, batch))
        if weights.distils:
            flat = {name: value.flatten(0, 1) for name, value in outputs.items()}
            parts.update(self._distillation(flat, batch))
        terms = [getattr(weights, name) * value for name, value in parts.items()]
        if self.l0_module is not None:
            parts["lagrangian"] = self.l0_module.lagrangian()
            terms.append(parts["lagrangian"])
        if not terms:
            raise ValueError(
                "no part of the loss applies to this batch. To fix, set a weight under loss that "
                "fits the data: sts_regression or cosent for scored pairs, distillation for all."
            )
        return {**parts, "total": torch.stack(terms).sum()}

    def _pair_losses(self, vectors: Tensor, scores: Tensor) -> dict[str, Tensor]:
        weights, (first, second) = self.loss_weights, vectors.unbind(1)
        parts = {}
        if weights.sts_regression:
            parts["sts_regression"] = sts_regression(first, second, scores)
        if weights.cosent:
            # Over the pairs of all ranks: each rank's share of the loss is the same number.
            every, gold, _ = gather_batch(torch.cat([first, second], dim=1), scores[:, None])
            size = first.shape[1]
            parts["cosent"] = cosent(every[:, :size], every[:, size:], gold[:, 0])
        return parts

    def _contrastive(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """This rank's queries against the passages of all ranks."""
        weights = self.loss_weights
        names = {"dense": "dense_vecs", "sparse": "token_weights", "colbert": "colbert_vecs"}
        wanted = {"dense_vecs", *(names[name] for name in weights.contrastive_outputs)}
        compared = {name: value for name, value in outputs.items() if name in wanted}
        queries = _texts(compared, batch, slice(0, 1))
        passages, numbers = gather_texts(
            _texts(compared, batch, slice(1, None)), batch["passage_texts"].flatten()
        )
        per_query = batch["passage_texts"].shape[1]
        rows = torch.arange(len(batch["passage_texts"]), device=numbers.device)
        targets = (rows + dist.get_global_rank() * len(rows)) * per_query
        excluded = exclude_positives(batch["positive_texts"], numbers, targets)
        scores = compute_scores(queries, passages, self.special_ids)
        parts = {}
        temperature = weights.temperature if self.temperature is None else self.temperature()
        if weights.contrastive:
            losses = {
                name: info_nce(score, targets, temperature, excluded)
                for name, score in scores.items()
            }
            parts["contrastive"] = unified_loss(losses)
        if weights.self_distillation:
            teacher = scores.pop("ensemble")
            losses = {
                name: score_distillation(score, teacher, temperature, excluded)
                for name, score in scores.items()
            }
            parts["self_distillation"] = unified_loss(losses)
        return parts

    def _distillation(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        weights, targets = self.loss_weights, self._teacher_outputs(batch)
        mask = batch["attention_mask"].flatten(0, 1)
        parts = {}
        if weights.distillation_alignment or weights.distillation_similarity:
            parts.update(self._dense_distillation(outputs["dense_vecs"], targets["dense_vecs"]))
        if weights.distillation_sparse:
            ids = batch["input_ids"].flatten(0, 1)
            special = torch.tensor(self.special_ids, device=ids.device, dtype=ids.dtype)
            lexical = mask.bool() & ~torch.isin(ids, special)
            parts["distillation_sparse"] = token_weight_distillation(
                outputs["token_weights"], targets["token_weights"], lexical
            )
        if weights.distillation_colbert:
            parts["distillation_colbert"] = token_vector_distillation(
                outputs["colbert_vecs"], targets["colbert_vecs"], mask[:, 1:]
            )
        return parts

    def _dense_distillation(self, vectors: Tensor, target: Tensor) -> dict[str, Tensor]:
        weights = self.loss_weights
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

    def _teacher_outputs(self, batch: Batch) -> dict[str, Tensor]:
        names = self.loss_weights.distilled
        if all(f"teacher_{name}" in batch for name in names):
            return {name: batch[f"teacher_{name}"].flatten(0, 1) for name in names}
        if self._teacher[0] is None:
            raise ValueError(
                f"the batch has no {', '.join(names)} of the teacher and there is no teacher to "
                f"compute them. To fix, set teacher.cache=false, or make the batches with the "
                f"cached outputs."
            )
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


def _texts(outputs: dict[str, Tensor], batch: Batch, which: slice) -> Outputs:
    """Some of the N texts of every example, one after the other."""

    def select(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, which].flatten(0, 1)

    names = ("dense_vecs", "token_weights", "colbert_vecs")
    ids, mask = select(batch["input_ids"]), select(batch["attention_mask"])
    return Outputs(ids, mask, **{name: select(outputs.get(name)) for name in names})


def gather_texts(texts: Outputs, numbers: Tensor) -> tuple[Outputs, Tensor]:
    """The texts of all ranks, with gradient to the rank that each text came from.

    Args:
        texts: This rank's texts.
        numbers: Which text each of them is, shape ``(B,)``.

    Returns:
        The same of all ranks, one rank after the other, padded to the longest text of all.
    """
    if dist.get_world_size() == 1:
        return texts, numbers
    longest = torch.tensor(texts.input_ids.shape[1], device=numbers.device)
    dist.all_reduce(longest, "MAX")
    missing = int(longest) - texts.input_ids.shape[1]

    def gather(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        # (B, T, ...): zeros behind the last token
        return gather_rows(functional.pad(value, [0, 0] * (value.ndim - 2) + [0, missing]))

    gathered = Outputs(
        gather(texts.input_ids),
        gather(texts.attention_mask),
        gather_rows(texts.dense_vecs),
        gather(texts.token_weights),
        gather(texts.colbert_vecs),
    )
    return gathered, gather_rows(numbers)


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
    own = own + dist.get_global_rank() * student.shape[0]
    return gather_rows(student), gather_rows(teacher), own
