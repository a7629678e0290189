"""What a pruning step costs beside a step of plain fine-tuning, on the same batches.

Three trainings take turns on every batch: (a) transformers' model of the same weights, (b) ours
with gates, (c) ours with gates and a teacher that embeds the batch too. Loss and optimizer are the
same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bge_pruning.builders import l0_groups, weight_groups
from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts
from bge_pruning.datasets.length_groups import group_batches
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.encoder_shape import EncoderShape, layer_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.model_folder import compute_hf_config
from bge_pruning.models.objective import LossWeights, TeacherMap, distillation_parts
from bge_pruning.models.pretrained import BaseModel
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.models.teacher import FrozenEncoder
from bge_pruning.utils.memory import measure_peak_bytes

PLAIN, GATES, TEACHER = "plain fine-tuning", "gates", "gates and teacher"
# How texts are put together: cut to one length; padded to the longest of a random batch; grouped.
FIXED, RANDOM, GROUPED = "fixed length", "random batches", "length groups"
LOSS = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class StepCost:
    """Steps of one training on one kind of batches.

    Attributes:
        training: ``PLAIN``, ``GATES`` or ``TEACHER``.
        batches: ``FIXED``, ``RANDOM`` or ``GROUPED``.
        seconds: Of every step.
        tokens: Real tokens of every step.
        padding: Share of padding over all steps.
        utilisation: Model FLOPs per second as a share of what a large product reaches here; those
            of the trained model on real tokens, teacher and padding not counted.
        peak_bytes: The most that tensors take beside weights and optimizer state; of the device on
            a GPU.
    """

    training: str
    batches: str
    seconds: list[float]
    tokens: list[int]
    padding: float
    utilisation: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over all steps."""
        return sum(self.tokens) / sum(self.seconds)


Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], None]


def measure_training(
    base: BaseModel,
    texts: TokenizedTexts,
    batch_size: int,
    length: int,
    steps: int,
    device: str = "cpu",
    autocast: bool = False,
) -> list[StepCost]:
    """Measure all trainings on all kinds of batches.

    Args:
        base: The model; trained on in the course of it.
        texts: Texts of mixed lengths.
        batch_size: Texts of a batch.
        length: Tokens of a text of fixed length.
        steps: Steps of each training on each kind of batches.
        device: Torch device.
        autocast: Run products in bfloat16.

    Raises:
        ValueError: If there are too few texts.
    """
    if len(texts) < batch_size * steps:
        raise ValueError(
            f"{len(texts)} texts are too few for {steps} batches of {batch_size}. To fix, give "
            f"more texts, or lower --steps or --batch-size."
        )
    kinds = make_batches(texts, batch_size, length, steps, base.hf_config["pad_token_id"])
    shape, peak_rate = base.shape, measure_flops(device, autocast)
    trainings = make_trainings(base, device, autocast)
    costs = []
    for kind, batches in kinds.items():
        moved = [(ids.to(device), mask.to(device)) for ids, mask in batches]
        seconds = _take_turns(trainings, moved, device)
        for name, step in trainings.items():
            tokens = [int(mask.sum()) for _, mask in moved]
            flops = sum(step_flops(shape, mask.sum(1).tolist()) for _, mask in moved)
            widest = max(moved, key=lambda batch: batch[0].numel())
            costs.append(
                StepCost(
                    name,
                    kind,
                    seconds[name],
                    tokens,
                    1.0 - sum(tokens) / sum(ids.numel() for ids, _ in moved),
                    flops / sum(seconds[name]) / peak_rate,
                    _peak_bytes(step, widest, device),
                )
            )
    return costs


def make_batches(
    texts: TokenizedTexts, batch_size: int, length: int, steps: int, pad: int
) -> dict[str, list[Batch]]:
    """Batches by kind; the random and the grouped ones are made of the same texts.

    Args:
        texts: Texts of mixed lengths.
        batch_size: Texts of a batch.
        length: Tokens of a text of fixed length.
        steps: Batches of each kind.
        pad: Id of the padding token.
    """
    lengths = texts.lengths[: batch_size * steps]
    order = {
        kind: group_batches(lengths, batch_size, (0,), grouped=kind == GROUPED)
        for kind in (RANDOM, GROUPED)
    }
    everything = texts.ids[np.isin(texts.ids, [pad], invert=True)]
    fixed = np.resize(everything, (steps, batch_size, length)).astype(np.int64)
    return {
        FIXED: [(torch.from_numpy(ids), torch.ones_like(torch.from_numpy(ids))) for ids in fixed],
        **{
            kind: [pad_texts([texts[i] for i in batch], pad) for batch in batches]
            for kind, batches in order.items()
        },
    }


def make_trainings(base: BaseModel, device: str, autocast: bool) -> dict[str, Step]:
    """A step of each training, on copies of the model.

    Args:
        base: The model.
        device: Torch device.
        autocast: Run products in bfloat16.
    """
    hidden = base.shape.hidden_size

    def targets(batch: Batch) -> Tensor:
        generator = torch.Generator().manual_seed(int(batch[0].sum()))
        vectors = torch.randn(len(batch[0]), hidden, generator=generator)
        return F.normalize(vectors, dim=-1).to(device)

    plain = _huggingface_model(base).to(device).train()
    plain_optimizer = _optimizer(weight_groups([plain], LEARNING_RATE, 0.01))

    def plain_loss(batch: Batch) -> Tensor:
        ids, mask = batch
        states = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs = {"dense_vecs": base.heads.dense_vecs(states, mask)}
        named = {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
        vectors = {"dense_vecs": targets(batch)}
        return sum(distillation_parts(LOSS, outputs, vectors, named, TeacherMap(), ()).values())

    gated = _gated_model(base, None).to(device).train()
    taught = _gated_model(base, FrozenEncoder(*_copy(base), ("dense_vecs",))).to(device).train()

    def gated_loss(model: ComposerBGEM3) -> Callable[[Batch], Tensor]:
        def loss(batch: Batch) -> Tensor:
            ids, mask = batch
            named = {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
            if model is gated:
                named["teacher_dense_vecs"] = targets(batch)[:, None]
            return model.loss(model(named), named)["total"]

        return loss

    def gated_optimizer(model: ComposerBGEM3) -> torch.optim.Optimizer:
        groups = weight_groups([model.backbone, model.heads], LEARNING_RATE, 0.01)
        return _optimizer(groups + l0_groups(model.l0_module, 0.1, 0.02, 1.0))

    return {
        PLAIN: _step(plain_loss, plain_optimizer, device, autocast),
        GATES: _step(gated_loss(gated), gated_optimizer(gated), device, autocast, gated.l0_module),
        TEACHER: _step(
            gated_loss(taught), gated_optimizer(taught), device, autocast, taught.l0_module
        ),
    }


def _huggingface_model(base: BaseModel) -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(**compute_hf_config(base.hf_config, base.shape))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # as ours
    model = XLMRobertaModel(config, add_pooling_layer=base.shape.pooler)
    model.load_state_dict(base.backbone.state_dict())
    if base.shape.pooler:
        model.pooler.requires_grad_(False)
    return model


def _copy(base: BaseModel) -> tuple[XLMRobertaBackbone, EmbeddingHeads]:
    shape, config = base.shape, base.hf_config
    backbone = XLMRobertaBackbone(shape, config["pad_token_id"], config["layer_norm_eps"])
    heads = EmbeddingHeads(
        shape.hidden_size, base.heads.pooling, shape.sparse_head, shape.colbert_dim
    )
    backbone.load_state_dict(base.backbone.state_dict())
    heads.load_state_dict(base.heads.state_dict())
    return backbone, heads


def _gated_model(base: BaseModel, teacher: FrozenEncoder | None) -> ComposerBGEM3:
    """With gates on all four axes, pulled to half of each by the multipliers."""
    shape = base.shape
    heads = max(1, shape.num_attention_heads // 2)
    target = replace(
        shape,
        num_attention_heads=heads,
        hidden_size=heads * shape.head_dim,
        num_hidden_layers=max(1, shape.num_hidden_layers // 2),
        intermediate_size=max(1, shape.intermediate_size // 2),
    )
    gates = L0Module(shape, AXES, target, None, seed=0)
    gates.warmup_progress = 0.5
    return ComposerBGEM3(*_copy(base), gates, LOSS, teacher)


def _optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def _step(
    loss: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    device: str,
    autocast: bool,
    gates: L0Module | None = None,
) -> Step:
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


def _take_turns(
    trainings: dict[str, Step], batches: Sequence[Batch], device: str
) -> dict[str, list[float]]:
    """Seconds of every step; each training goes first every third time."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    names = list(trainings)
    for name in names:
        trainings[name](batches[0])  # warm
    for index, batch in enumerate(batches):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            _wait(device)
            started = time.perf_counter()
            trainings[name](batch)
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(step: Step, batch: Batch, device: str) -> int:
    if torch.device(device).type != "cuda":
        return measure_peak_bytes(lambda: step(batch))
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(batch)
    return torch.cuda.max_memory_allocated() - before


def step_flops(shape: EncoderShape, lengths: Sequence[int]) -> float:
    """Floating-point operations of a training step on texts of these lengths, padding left out.

    Forward 2 for each weight and token, and ``4 T A D`` for a token's attention in a layer; the
    backward pass is twice that.

    Args:
        shape: Sizes of the trained model.
        lengths: Tokens of each text.
    """
    layer = layer_parameters(
        shape.hidden_size, shape.num_attention_heads, shape.intermediate_size, shape.head_dim
    )
    inner = shape.num_attention_heads * shape.head_dim
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    return 3.0 * shape.num_hidden_layers * (2.0 * layer * tokens + 4.0 * inner * squares)


def measure_flops(device: str, autocast: bool, size: int = 2048, rounds: int = 9) -> float:
    """Operations per second of a large matrix product: the median of some rounds.

    Args:
        device: Torch device.
        autocast: In bfloat16.
        size: Rows and columns.
        rounds: Measurements.
    """
    dtype = torch.bfloat16 if autocast else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        a @ a
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / float(np.median(seconds))


def summarise(costs: Sequence[StepCost]) -> dict[str, Any]:
    """Medians and ratios, JSON-ready.

    Args:
        costs: See :func:`measure_training`.

    Returns:
        ``steps``, the measurements; ``ratios`` of the step times by kind of batches (median and
        quartiles of the ratio on the same batch): ``gates`` over plain, ``teacher`` over gates; and
        ``throughput``: tokens per second of gates on each kind, in times of plain fine-tuning on
        random batches.
    """
    found = {(cost.training, cost.batches): cost for cost in costs}
    ratios = {}
    for kind in (FIXED, RANDOM, GROUPED):
        plain, gates, teacher = (
            np.array(found[name, kind].seconds) for name in (PLAIN, GATES, TEACHER)
        )
        ratios[kind] = {
            "gates": np.percentile(gates / plain, [25, 50, 75]).tolist(),
            "teacher": np.percentile(teacher / gates, [25, 50, 75]).tolist(),
        }
    reference = found[PLAIN, RANDOM].tokens_per_second
    throughput = {
        kind: found[GATES, kind].tokens_per_second / reference for kind in (RANDOM, GROUPED)
    }
    steps = [
        {
            **asdict(cost),
            "median_seconds": float(np.median(cost.seconds)),
            "tokens_per_second": cost.tokens_per_second,
        }
        for cost in costs
    ]
    return {"steps": steps, "ratios": ratios, "throughput": throughput}
