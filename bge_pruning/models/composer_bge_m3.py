"""The ComposerModel: encoder, heads and gates together, without arithmetic of its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Sequence

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric, SpearmanCorrCoef

from bge_pruning.models import losses
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import (
    Batch,
    LearnedTemperature,
    LossWeights,
    TeacherMap,
    distillation_parts,
    following_layers,
    pair_parts,
    passage_parts,
)
from bge_pruning.models.structural_pruning import PruningMasks
from bge_pruning.models.teacher import LAST, FrozenEncoder, compute_outputs


class ComposerBGEM3(ComposerModel):
    """An embedding model that is pruned while it is trained.

    A batch holds ``input_ids`` and ``attention_mask`` of shape ``(B, N, T)`` (N texts per
    example), and optionally

    * ``lengths``, the tokens of each text as ``B`` lists of ``N`` numbers on the host, so that no
      step waits for a GPU to count them,
    * ``scores`` ``(B,)`` in [0, 1] of sentence pairs,
    * the teacher's outputs, ``teacher_dense_vecs`` ``(B, N, Ht)``, ``teacher_token_weights``
      ``(B, N, T)``, ``teacher_colbert_vecs`` ``(B, N, T - 1, C)``, or the last hidden states of a
      frozen encoder, ``teacher_last_states`` ``(B, N, T, H)``,
    * for a query and its passages (the other texts): ``passage_texts`` ``(B, N - 1)``, the numbers
      of the passages, ``positive_texts`` ``(B, K)``, those of the known positives of each query,
      padded with -1, ``passage_scores`` ``(B, N - 1)``, a teacher's scores of the passages, and
      ``own_passages_only`` ``(B,)``, whether passages of other queries are no negatives,
    * ``source``, the name of the batch's source.

    Losses over the batch are exact in pieces too: with a ``chunk_size`` the batch is embedded piece
    by piece, keeping only the outputs; the loss is that of the whole batch; and the backward pass
    embeds each piece again to propagate its outputs' gradients (cached gradients,
    arXiv:2101.06983). This costs one more forward pass and keeps the activations of only one piece
    in memory. All pieces of a step have the same gates.

    Args:
        l0_module: The gates; ``None`` trains the model without pruning.
        teacher: Frozen model that embeds the texts of a batch without outputs of the teacher;
            called with token ids and mask of shape ``(B * N, T)``.
        teacher_dimensions: Dimensions of the teacher that an extracted student has kept, shape
            ``(H,)``; ``None`` if the spaces are the same.
        teacher_layers: Layers of the teacher that an extracted student has kept; ``None`` if it
            has all of them, or gates that say which.
        special_ids: Token ids that carry no sparse weight (cls, eos, pad, unk).
        cpu_dtype: Precision of products on a CPU, ``torch.bfloat16`` or ``None`` for that of the
            weights; on other devices the trainer sets the precision.
        freeze_encoder: Train the heads alone; the encoder stays in evaluation mode.
    """

    def __init__(
        self,
        backbone: XLMRobertaBackbone,
        heads: EmbeddingHeads,
        l0_module: L0Module | None,
        loss_weights: LossWeights,
        teacher: FrozenEncoder | None = None,
        teacher_dimensions: Tensor | None = None,
        teacher_layers: Sequence[int] | None = None,
        eval_target_model: bool = True,
        special_ids: Sequence[int] = (),
        chunk_size: int | None = None,
        cpu_dtype: torch.dtype | None = None,
        freeze_encoder: bool = False,
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
        kept = teacher_layers if loss_weights.distillation_hidden else None
        self.register_buffer("teacher_layers", _layer_map(kept, teacher), persistent=False)
        self.special_ids = tuple(special_ids)
        self.chunk_size = chunk_size
        self.cpu_dtype = cpu_dtype
        learned = loss_weights.learn_temperature and loss_weights.contrastive > 0
        self.temperature = LearnedTemperature(loss_weights.temperature) if learned else None
        self._freeze_idle_heads()
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> ComposerBGEM3:
        """Set the mode of all but a frozen encoder, which is always evaluated."""
        super().train(mode)
        if self.freeze_encoder:
            self.backbone.eval()
        return self

    def _freeze_idle_heads(self) -> None:
        """Freeze heads whose output is not in the loss: DDP would wait for their gradients."""
        self.loss_weights.check_heads(self.heads.names())
        for name, head in self.heads.linears().items():
            head.requires_grad_(name in self.loss_weights.trained)

    def update_drawn_rows(self) -> None:
        """Give the table of words gradients of the drawn rows only, unless it is frozen.

        The trainer's DDP passes over it: it would exchange all rows, and NCCL no such gradients.
        See :mod:`bge_pruning.algorithms.row_updates`.
        """
        table = self.backbone.embeddings.word_embeddings
        table.sparse = table.weight.requires_grad
        if table.sparse:
            # To leave padding out, its gradient would wait for the device, and it is 0 anyway.
            table.padding_idx = None
        names = {parameter: name for name, parameter in self.named_parameters()}
        self._ddp_params_and_buffers_to_ignore = [names[p] for p in self.row_tables()]

    def row_tables(self) -> list[nn.Parameter]:
        """Tables whose gradients are of the drawn rows only."""
        table = self.backbone.embeddings.word_embeddings
        return [table.weight] if table.sparse else []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs by name, shape ``(B, N, ...)``; in evaluation only the dense vectors."""
        masks = None if self.l0_module is None else self._masks()
        names = self.loss_weights.trained if self.training else ("dense_vecs",)
        return self._embed(batch, masks, names)

    def _masks(self) -> PruningMasks:
        if self.training:
            return self.l0_module.sample_masks()
        return self.l0_module.deterministic_masks(at_target=self.eval_target_model)

    def _embed(
        self, batch: Batch, masks: PruningMasks | None, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Outputs by name, shape ``(B, N, ...)``, in pieces if there is a ``chunk_size``."""
        rows = len(batch["input_ids"])
        size = self.chunk_size or rows
        if size >= rows or not torch.is_grad_enabled():
            pieces = [self._outputs(batch, masks, names)]
        elif self.freeze_encoder:  # its activations are not kept anyway
            pieces = [self._outputs(piece, masks, names) for piece in _split(batch, size)]
        else:
            pieces = [
                checkpoint(self._outputs, piece, masks, names, use_reentrant=False)
                for piece in _split(batch, size)
            ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _outputs(
        self, batch: Batch, masks: PruningMasks | None, names: Sequence[str]
    ) -> dict[str, Tensor]:
        ids, mask, lengths = _flat(batch)
        with self._cpu_precision(ids.device):
            if self.freeze_encoder:
                states = self._frozen_states(batch, ids, mask, lengths)
                outputs = self.heads.outputs(states, mask, names)
            else:
                given = (self.backbone, self.heads, ids, mask, names, masks, lengths)
                outputs = compute_outputs(*given)
        size = batch["input_ids"].shape[:2]
        return {name: value.unflatten(0, size) for name, value in outputs.items()}

    @torch.no_grad()
    def _frozen_states(
        self, batch: Batch, ids: Tensor, mask: Tensor, lengths: list[int] | None
    ) -> Tensor:
        """Last hidden states of a frozen encoder, ``(B * N, T, H)``: cached, or computed now."""
        if f"teacher_{LAST}" in batch:
            return batch[f"teacher_{LAST}"].flatten(0, 1)
        return self.backbone(ids, mask, lengths=lengths)

    def _cpu_precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        if device.type != "cpu" or self.cpu_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=self.cpu_dtype)

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Weighted parts of the loss by name, and their ``total``."""
        parts = self._parts(outputs, batch)
        terms = [getattr(self.loss_weights, name) * value for name, value in parts.items()]
        if not terms:
            raise ValueError(
                "no part of the loss applies to this batch. To fix, set a weight under loss that "
                "fits the data: sts_regression or cosent for scored pairs, distillation for all."
            )
        terms += self._idle(outputs, parts)
        if self.l0_module is not None:
            parts["lagrangian"] = self.l0_module.lagrangian()
            terms.append(parts["lagrangian"])
            if self.l0_module.binarization:
                parts["binarization"] = self.l0_module.binarization_loss()
                terms.append(parts["binarization"])
        return {**parts, "total": torch.stack(terms).sum()}

    def _parts(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Parts of the loss that apply to the batch, without their weights.

        Only a teacher computes in the trainer's precision: a loss that rounds its cosines to 16
        bits and then divides them by a temperature has another gradient.
        """
        targets = self._teacher_outputs(batch) if self.loss_weights.distils else {}
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            outputs, targets = (
                {name: losses.widen(value) for name, value in values.items()}
                for values in (outputs, targets)
            )
            return self._exact_parts(outputs, targets, batch)

    def _exact_parts(
        self, outputs: dict[str, Tensor], targets: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        weights = self.loss_weights
        parts: dict[str, Tensor] = {}
        if "scores" in batch:
            parts.update(pair_parts(weights, outputs["dense_vecs"], batch["scores"]))
        if "passage_texts" in batch and weights.compares_passages:
            temperature = weights.temperature if self.temperature is None else self.temperature()
            options = temperature, self.special_ids, targets
            parts.update(passage_parts(weights, outputs, batch, *options))
        if weights.distils:
            flat = {name: value.flatten(0, 1) for name, value in outputs.items()}
            where = self._teacher_map()
            parts.update(distillation_parts(weights, flat, targets, batch, where, self.special_ids))
        return parts

    def _idle(self, outputs: dict[str, Tensor], parts: Collection[str]) -> list[Tensor]:
        """0 times each unused output, because DDP waits for gradients of all trained parameters.

        The batches of a mixed run have different parts of the loss, which take different outputs.
        """
        used = self.loss_weights.taken(parts)
        idle = [value.sum() for name, value in outputs.items() if name not in used]
        if self.temperature is not None and "contrastive" not in parts:
            idle.append(self.temperature())
        return [0.0 * value for value in idle]

    def _teacher_map(self) -> TeacherMap:
        """Map the student's dimensions and layers to the teacher's."""
        if not self.loss_weights.distillation_hidden:
            return TeacherMap(self.teacher_dimensions)
        if self.teacher_layers is not None:
            count = len(self.teacher_layers)
            even = torch.full((count,), 1.0 / count, device=self.teacher_layers.device)
            return TeacherMap(self.teacher_dimensions, self.teacher_layers, even)
        survives = self._surviving_layers()
        weights = survives / survives.sum()
        return TeacherMap(self.teacher_dimensions, following_layers(survives), weights)

    def _surviving_layers(self) -> Tensor:
        """True for the layers that are open now, shape ``(L,)``, without waiting for the device."""
        gates = None if self.l0_module is None else self.l0_module.log_alpha
        if gates is None or "layer" not in gates:
            count = self.backbone.shape.num_hidden_layers
            device = self.backbone.embeddings.word_embeddings.weight.device
            return torch.ones(count, dtype=torch.bool, device=device)
        expected = self.l0_module.open_probabilities()["layer"].detach().sum().round().clamp(min=1)
        ranks = gates["layer"].detach().argsort(descending=True).argsort()
        return ranks < expected

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
        size = self.chunk_size or len(batch["input_ids"])
        pieces = [self._teacher[0](*_flat(piece)) for piece in _split(batch, size)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}

    @torch.no_grad()
    def probe(self, batch: Batch, pruned: bool) -> Tensor:
        """Compute the loss of a batch without the constraint, with binary gates and no gradient.

        Unless it is ``pruned``, all gates are open.
        """
        masks = None
        if pruned and self.l0_module is not None:
            masks = self.l0_module.deterministic_masks(at_target=False)
        training = self.training
        self.eval()
        try:
            outputs = self._embed(batch, masks, self.loss_weights.trained)
            parts = self._parts(outputs, batch)
        finally:
            self.train(training)
        return sum(getattr(self.loss_weights, name) * value for name, value in parts.items())

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
            # A rank correlation needs all values of the split.
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


def _flat(batch: Batch) -> tuple[Tensor, Tensor, list[int] | None]:
    """Token ids and mask of all texts, ``(B * N, T)``, and their lengths if they are known."""
    lengths = batch.get("lengths")
    if lengths is not None:
        lengths = [length for row in lengths for length in row]
    return batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1), lengths


def _split(batch: Batch, size: int) -> list[Batch]:
    """Split the texts of a batch into pieces of ``size`` examples."""
    known = ("input_ids", "attention_mask", "lengths", f"teacher_{LAST}")
    names = [name for name in known if name in batch]
    starts = range(0, len(batch["input_ids"]), size)
    return [{name: batch[name][start : start + size] for name in names} for start in starts]


def _layer_map(kept: Sequence[int] | None, teacher: FrozenEncoder | None) -> Tensor | None:
    """The teacher's layer that each kept layer should reproduce."""
    if kept is None or teacher is None:
        return None
    survives = torch.zeros(teacher.backbone.shape.num_hidden_layers, dtype=torch.bool)
    survives[list(kept)] = True
    return following_layers(survives)[survives]
