"""Selects the losses that apply to a batch, and computes them as named parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bge_pruning.models import losses
from bge_pruning.models.embedding_heads import (
    BLOCK_PRODUCTS,
    OUTPUT_NAMES,
    Outputs,
    compute_scores,
)
from bge_pruning.models.encoder_shape import EncoderShape, LossMemory
from bge_pruning.models.gather import gather_batch, gather_texts, global_rank
from bge_pruning.models.packing import to_device
from bge_pruning.models.teacher import HIDDEN

# Tensors by name, the name of the source, and the lengths of the texts.
Batch = dict[str, "Tensor | str | list[list[int]]"]
Temperature = Tensor | float

# The output that a part of the loss takes. The parts that are not here score passages, by all
# outputs that are compared.
PART_OUTPUTS = {
    "sts_regression": "dense_vecs",
    "cosent": "dense_vecs",
    "distillation_alignment": "dense_vecs",
    "distillation_similarity": "dense_vecs",
    "distillation_sparse": "token_weights",
    "distillation_colbert": "colbert_vecs",
    "distillation_hidden": HIDDEN,
}


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss; a part of weight 0 is not computed."""

    sts_regression: float = 0.0
    cosent: float = 0.0
    distillation_alignment: float = 0.0
    distillation_similarity: float = 0.0
    distillation_sparse: float = 0.0
    distillation_colbert: float = 0.0
    distillation_hidden: float = 0.0
    distillation_scores: float = 0.0
    similarity_temperature: float = 0.05
    teacher_score_temperature: float = 0.5
    teacher_scores_in_batch: bool = False
    contrastive: float = 0.0
    self_distillation: float = 0.0
    score_distillation: float = 0.0
    contrastive_outputs: tuple[str, ...] = ("dense",)
    temperature: float = 0.02
    learn_temperature: bool = False

    def check_heads(self, names: Sequence[str]) -> None:
        """Refuse, with a ``ValueError``, a model with outputs of these names that lacks one."""
        if missing := sorted(set(self.trained) - {HIDDEN, *names}):
            raise ValueError(
                f"the loss trains {', '.join(missing)}, and the model has no head for it. To fix, "
                f"use a base model with that head, set model.init_missing_heads=true, or set that "
                f"part of the loss to 0."
            )

    @property
    def distils(self) -> bool:
        """Whether any part needs the teacher's outputs."""
        return bool(self.distilled)

    @property
    def distilled(self) -> tuple[str, ...]:
        """Outputs of the teacher that the parts need."""
        given = [part for part in vars(self) if part.startswith("distillation_")]
        needed = self.taken(part for part in given if getattr(self, part) > 0)
        return tuple(name for name in (*OUTPUT_NAMES.values(), HIDDEN) if name in needed)

    @property
    def compares_passages(self) -> bool:
        """Whether any part scores queries against passages."""
        return self.compares_batch or self.score_distillation > 0 or self.distillation_scores > 0

    @property
    def compares_batch(self) -> bool:
        """Whether any part scores queries against the passages of the whole batch."""
        taught = self.distillation_scores > 0 and self.teacher_scores_in_batch
        return self.contrastive > 0 or self.self_distillation > 0 or taught

    @property
    def compared(self) -> tuple[str, ...]:
        """Outputs that queries and passages are compared by."""
        wanted = {"dense", *self.contrastive_outputs} if self.compares_passages else set()
        return tuple(OUTPUT_NAMES[name] for name in OUTPUT_NAMES if name in wanted)

    def taken(self, parts: Iterable[str]) -> set[str]:
        """Outputs of the student that some parts of the loss take."""
        taken: set[str] = set()
        for part in parts:
            taken.update([PART_OUTPUTS[part]] if part in PART_OUTPUTS else self.compared)
        return taken

    @property
    def trained(self) -> tuple[str, ...]:
        """Outputs of the student that the parts need; the dense one always."""
        wanted = {"dense_vecs", *self.compared, *self.distilled}
        return tuple(name for name in (*OUTPUT_NAMES.values(), HIDDEN) if name in wanted)


@dataclass(frozen=True)
class TeacherMap:
    """Maps a student's dimensions and layers to its teacher's.

    Attributes:
        dimensions: The teacher's dimensions that the student has, shape ``(H,)``; ``None`` for all.
        layers: The teacher's layer that each student layer is compared with, shape ``(L,)``.
        weights: Weight of each student layer, 0 for a closed one, shape ``(L,)``.
    """

    dimensions: Tensor | None = None
    layers: Tensor | None = None
    weights: Tensor | None = None


def following_layers(survives: Tensor) -> Tensor:
    """Find the teacher's layer that each surviving layer should reproduce, shape ``(L,)``.

    A surviving layer feeds the next surviving one, which was trained on the output of the layer
    just before it; the last one feeds the heads. ``survives`` is True for each of the teacher's
    layers that the student has, ``(L,)``.
    """
    count = len(survives)
    places = torch.arange(count, device=survives.device)
    # Find the survivor at or after each layer, from the end, and then the one strictly after it.
    here = torch.where(survives, places, count).flip(0).cummin(0).values.flip(0)
    end = here.new_full((1,), count)
    return torch.cat([here[1:], end]) - 1


def pair_parts(weights: LossWeights, vectors: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Losses of scored pairs: normalised vectors ``(B, 2, H)``, gold scores ``(B,)`` in [0, 1]."""
    first, second = vectors.unbind(1)
    parts = {}
    if weights.sts_regression:
        parts["sts_regression"] = losses.sts_regression(first, second, scores)
    if weights.cosent:
        # It compares the pairs of all ranks, so every rank computes the same number.
        every, gold, _ = gather_batch(torch.cat([first, second], dim=1), scores[:, None])
        size = first.shape[1]
        parts["cosent"] = losses.cosent(every[:, :size], every[:, size:], gold[:, 0])
    return parts


def passage_parts(
    weights: LossWeights,
    outputs: dict[str, Tensor],
    batch: Batch,
    temperature: Temperature,
    special_ids: Sequence[int],
    taught: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Losses of this rank's queries against the passages of all ranks.

    Outputs of queries and their passages are ``(B, N, ...)``, the teacher's, by name too, ``(B * N,
    ...)``; the batch has ``passage_texts``, ``positive_texts`` and optionally ``passage_scores``,
    for which a query's own passages do, and ``own_passages_only``, ``(B,)``, where the other
    queries' passages are no negatives. That does not bind the teacher, which says what they are.
    """
    compared = {name: value for name, value in outputs.items() if name in weights.compared}
    queries, passages = _queries_and_passages(compared, batch)
    count, per_query = batch["passage_texts"].shape
    found: dict[str, dict[str, Tensor]] = {}
    if weights.compares_batch:
        every, numbers = gather_texts(passages, batch["passage_texts"].flatten())
        rows = torch.arange(count, device=numbers.device)
        targets = (rows + global_rank() * count) * per_query
        excluded = _excluded(batch, numbers, targets)
        scores = compute_scores(queries, every, special_ids)
    if weights.contrastive:
        found["contrastive"] = {
            name: losses.info_nce(score, targets, temperature, excluded)
            for name, score in scores.all().items()
        }
    if weights.score_distillation and "passage_scores" in batch:
        given = batch["passage_scores"]
        own = _own_scores(queries, passages, per_query, special_ids)
        found["score_distillation"] = {
            name: losses.score_distillation(score, given, temperature, teacher_temperature=1.0)
            for name, score in own.items()
        }
    if weights.distillation_scores and (weights.teacher_scores_in_batch or per_query > 1):
        given = {name: taught[name].unflatten(0, (count, -1)) for name in compared}
        if weights.teacher_scores_in_batch:
            own = scores.all()
        else:
            own = _own_scores(queries, passages, per_query, special_ids)
        found["distillation_scores"] = _to_teacher(weights, own, given, batch, special_ids)
    if weights.self_distillation:
        found["self_distillation"] = {
            name: losses.score_distillation(score, scores.ensemble, temperature, excluded)
            for name, score in scores.outputs.items()
        }
    return {part: losses.unified_loss(values) for part, values in found.items()}


def _excluded(batch: Batch, numbers: Tensor, targets: Tensor) -> Tensor:
    """Passages of all ranks that are no negatives of this rank's queries, ``(B, passages)``."""
    excluded = losses.exclude_positives(batch["positive_texts"], numbers, targets)
    if "own_passages_only" in batch:
        per_query = batch["passage_texts"].shape[1]
        columns = torch.arange(len(numbers), device=numbers.device)
        others = columns[None, :] // per_query != targets[:, None] // per_query
        excluded = excluded | (others & batch["own_passages_only"][:, None])
    return excluded


def _own_scores(
    queries: Outputs, passages: Outputs, per_query: int, special_ids: Sequence[int]
) -> dict[str, Tensor]:
    """Scores of each query with its own passages, ``(Q, per_query)``, by name."""
    pairs = zip(queries.split(1), passages.split(per_query), strict=True)
    rows = [compute_scores(*pair, special_ids).all() for pair in pairs]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _to_teacher(
    weights: LossWeights,
    scores: dict[str, Tensor],
    taught: dict[str, Tensor],
    batch: Batch,
    special_ids: Sequence[int],
) -> dict[str, Tensor]:
    """Losses of scores by name ``(Q, P)``, of a query's own passages or those of all ranks.

    The teacher's scores of the same passages are computed from its outputs ``(B, N, ...)``.
    """
    queries, passages = _queries_and_passages(taught, batch)
    texts = batch["passage_texts"]
    if weights.teacher_scores_in_batch:
        every, _ = gather_texts(passages, texts.flatten())
        given = compute_scores(queries, every, special_ids).all()
    else:
        given = _own_scores(queries, passages, texts.shape[1], special_ids)
    return {
        name: losses.score_distillation(
            scores[name], score, weights.teacher_score_temperature * losses.spread(score)
        )
        for name, score in given.items()
    }


def distillation_parts(
    weights: LossWeights,
    outputs: dict[str, Tensor],
    targets: dict[str, Tensor],
    batch: Batch,
    teacher: TeacherMap,
    special_ids: Sequence[int],
) -> dict[str, Tensor]:
    """Distances of the student's outputs ``(B * N, ...)`` from the teacher's, both by name."""
    mask = batch["attention_mask"].flatten(0, 1)
    parts = {}
    if weights.distillation_alignment or weights.distillation_similarity:
        parts.update(
            _dense_parts(weights, outputs["dense_vecs"], targets["dense_vecs"], teacher.dimensions)
        )
    if weights.distillation_sparse:
        ids = batch["input_ids"].flatten(0, 1)
        special = to_device(torch.tensor(special_ids, dtype=ids.dtype), ids.device)
        lexical = mask.bool() & ~torch.isin(ids, special)
        parts["distillation_sparse"] = losses.token_weight_distillation(
            outputs["token_weights"], targets["token_weights"], lexical
        )
    if weights.distillation_colbert:
        parts["distillation_colbert"] = losses.token_vector_distillation(
            outputs["colbert_vecs"], targets["colbert_vecs"], mask[:, 1:]
        )
    if weights.distillation_hidden:
        states, target = outputs[HIDDEN], targets[HIDDEN]
        parts["distillation_hidden"] = losses.hidden_state_distillation(
            losses.scatter_to_teacher_space(states, teacher.dimensions, target.shape[-1]),
            target.index_select(1, teacher.layers),
            teacher.weights,
            mask,
        )
    return parts


def _dense_parts(
    weights: LossWeights, vectors: Tensor, target: Tensor, dimensions: Tensor | None
) -> dict[str, Tensor]:
    parts = {}
    if weights.distillation_alignment:
        student = losses.scatter_to_teacher_space(vectors, dimensions, target.shape[1])
        parts["distillation_alignment"] = losses.distillation_alignment(student, target)
    if weights.distillation_similarity:
        all_student, all_target, own = gather_batch(vectors, target)
        parts["distillation_similarity"] = losses.distillation_similarity(
            vectors, target, all_student, all_target, own, weights.similarity_temperature
        )
    return parts


def _queries_and_passages(outputs: dict[str, Tensor], batch: Batch) -> tuple[Outputs, Outputs]:
    """The first and the other texts of every example, one after the other.

    A batch is padded to its longest text, often a passage. Both are cut to their own longest.
    """
    lengths = batch.get("lengths")
    if lengths is None:
        lengths = batch["attention_mask"].sum(-1).tolist()  # the host waits
    longest = max(row[0] for row in lengths), max(max(row[1:]) for row in lengths)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")} | outputs
    sides: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, value in given.items():
        # One split, whose gradient is one concatenation; slices would each be padded back.
        parts = value.split([1, value.shape[1] - 1], dim=1)
        for side, part, end in zip(sides, parts, longest, strict=True):
            tokens = {"dense_vecs": part.shape[2], "colbert_vecs": end - 1}.get(name, end)
            short = part[:, :, :tokens] if tokens < part.shape[2] else part
            side[name] = short.flatten(0, 1)
    return Outputs(**sides[0]), Outputs(**sides[1])


# Multiples, measured, of the multi-vectors that exist while the gradient of their lengths is
# computed, and of the hidden states that exist while they are compared, beside the student's own.
NORMALISING, STATES = 6.7, 4.3


def loss_memory(
    weights: LossWeights,
    shape: EncoderShape,
    rows: int,
    width: int,
    length: int,
    rows_at_once: int | None = None,
    ranks: int = 1,
    cached: bool = True,
) -> LossMemory:
    """Estimate what the losses of a batch take: outputs, passages of all ranks, their gradients.

    Args:
        rows: Examples of ``width`` texts on one device, padded to ``length`` tokens each.
        rows_at_once: Examples that are embedded at once, if the batch is compared as a whole.
        cached: Whether the teacher's outputs come with the batch.
    """
    of_text = {
        "dense_vecs": shape.hidden_size,
        "token_weights": length,
        "colbert_vecs": (length - 1) * shape.colbert_dim,
        HIDDEN: length * shape.hidden_size * shape.num_hidden_layers,
    }
    sizes = {name: 4.0 * rows * width * size for name, size in of_text.items()}
    outputs = sum(sizes[name] for name in weights.trained)
    targets = sum(sizes[name] for name in weights.distilled)
    vectors = sizes["colbert_vecs"] if "colbert_vecs" in weights.trained else 0.0
    in_pieces = rows_at_once is not None and rows_at_once < rows
    comparing = 0.0 if in_pieces else vectors  # before they are normalised
    if weights.distillation_colbert:
        comparing += vectors
    if weights.distillation_hidden:
        comparing += STATES * sizes[HIDDEN] - targets
    if "colbert_vecs" in weights.compared:
        passages = vectors * (width - 1) / width
        gathers = ranks > 1 and weights.compares_batch
        block = min(BLOCK_PRODUCTS, rows * length * rows * (width - 1) * ranks * length)
        comparing += passages + max(vectors, 2 * ranks * passages if gathers else 0.0) + 5.0 * block
    backward = NORMALISING * vectors
    if in_pieces:  # the gradient of all outputs, and what a piece adds
        backward = outputs + (NORMALISING - 1) * vectors * rows_at_once / rows
    kept, computed = (targets, 0.0) if cached else (0.0, targets)
    return LossMemory(outputs + kept, comparing + computed, backward, in_pieces)


LOWEST, HIGHEST = 0.005, 1.0


class LearnedTemperature(nn.Module):
    """``exp(a + (b - a) sigmoid(raw))`` between the logarithms of ``LOWEST`` and ``HIGHEST``."""

    def __init__(self, start: float) -> None:
        super().__init__()
        if not LOWEST < start < HIGHEST:
            raise ValueError(
                f"a learned temperature cannot start at {start}, expected a number between "
                f"{LOWEST} and {HIGHEST}. To fix, set loss.temperature."
            )
        low, high = math.log(LOWEST), math.log(HIGHEST)
        share = (math.log(start) - low) / (high - low)
        self.raw = nn.Parameter(torch.tensor(math.log(share / (1.0 - share))))

    def forward(self) -> Tensor:
        """The temperature, a scalar."""
        low, high = math.log(LOWEST), math.log(HIGHEST)
        return torch.exp(low + (high - low) * torch.sigmoid(self.raw))
