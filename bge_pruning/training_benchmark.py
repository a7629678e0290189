"""What a pruning step costs beside a step of plain fine-tuning, on the same batches.

The trainings of :mod:`bge_pruning.benchmark_trainings` take turns on every batch.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bge_pruning.benchmark_trainings import (
    FIXED,
    GATES,
    GROUPED,
    PLAIN,
    RANDOM,
    TEACHER,
    Batch,
    Training,
    make_batches,
    make_trainings,
)
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.models.encoder_shape import forward_flops
from bge_pruning.models.pretrained import BaseModel
from bge_pruning.utils.memory import measure_peak_bytes
from bge_pruning.utils.model_analysis import wait_for


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
        base: The model; copies of it are trained.
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
    pad, shape = base.hf_config["pad_token_id"], base.shape
    kinds = make_batches(texts, batch_size, length, steps, pad, shape.hidden_size)
    trainings = make_trainings(base, device, autocast)
    peak_rate = measure_flops(device, autocast)
    costs = []
    for kind, batches in kinds.items():
        moved = [{name: value.to(device) for name, value in b.items()} for b in batches]
        lengths = [batch["attention_mask"].sum(-1).flatten().tolist() for batch in moved]
        tokens = [sum(row) for row in lengths]
        padded = sum(batch["input_ids"].numel() for batch in moved)
        flops = 3.0 * sum(forward_flops(shape, row) for row in lengths)
        widest = max(moved, key=lambda batch: batch["input_ids"].numel())
        seconds = _take_turns(trainings, moved, device)
        costs += [
            StepCost(
                training=name,
                batches=kind,
                seconds=seconds[name],
                tokens=tokens,
                padding=1.0 - sum(tokens) / padded,
                utilisation=flops / sum(seconds[name]) / peak_rate,
                peak_bytes=_peak_bytes(training, widest, device),
            )
            for name, training in trainings.items()
        ]
    return costs


def _take_turns(
    trainings: dict[str, Training], batches: Sequence[Batch], device: str
) -> dict[str, list[float]]:
    """Seconds of every step; each training goes first every third time."""
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    names = list(trainings)
    for name in names:
        trainings[name].step(batches[0])  # warm
    for index, batch in enumerate(batches):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            wait_for(device)
            started = time.perf_counter()
            trainings[name].step(batch)
            wait_for(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _peak_bytes(training: Training, batch: Batch, device: str) -> int:
    if torch.device(device).type != "cuda":
        return measure_peak_bytes(lambda: training.step(batch))
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.step(batch)
    return torch.cuda.max_memory_allocated() - before


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
        wait_for(device)
        started = time.perf_counter()
        a @ a
        wait_for(device)
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
