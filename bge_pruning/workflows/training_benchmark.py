"""Measure what a pruning step costs beside a step of plain fine-tuning, on the same batches.

The trainings of :mod:`bge_pruning.workflows.training_batches` are interleaved on every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from bge_pruning.config.load import load_config
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.evaluation.random_model import random_base_model
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.models.encoder_shape import (
    EncoderShape,
    count_parameters,
    forward_flops,
    step_memory,
)
from bge_pruning.reports.efficiency_table import LIMITS, RATIOS, THROUGHPUT_GOAL, USUAL
from bge_pruning.training.plan import build_plan
from bge_pruning.utils import model_analysis
from bge_pruning.utils.records import (
    CACHED,
    COMPILED,
    FROZEN,
    GATES,
    PLAIN,
    TEACHER,
    TRAININGS,
    WHOLE,
)
from bge_pruning.workflows.training_batches import (
    GROUPED,
    RANDOM,
    TextBatches,
    Training,
    make_batches,
    make_trainings,
)

HALVINGS = 12
# The allocator keeps more than tensors take: a process of BGE-M3's size took 1.05 times their sum.
MARGIN = 1.1
# Rows and columns of a product, and how many are timed together: a GPU needs large ones, and many
# of them, so that the time of a call does not count.
CPU_PRODUCT, GPU_PRODUCT = (2048, 1), (8192, 20)
PRODUCT_ROUNDS, WARM_UPS = 9, 3


@dataclass(frozen=True)
class MemoryNeed:
    """Memory of interleaved trainings of one model.

    Each training keeps its weights and moments; activations and gradients exist for one at a time.
    Gated layers compute only the real ``tokens`` of the largest batch; ``padded`` counts its
    padding too. Products run in 16-bit autocast if ``half``.
    """

    shape: EncoderShape
    tokens: int
    padded: int
    half: bool

    def total(self, names: Sequence[str]) -> float:
        """Return the bytes that these trainings need together."""
        # Compiled layers compute padding too where there is no kernel for texts of any lengths.
        counts = {n: self.padded if n in (PLAIN, COMPILED) else self.tokens for n in names}
        words = {n: None if n in (PLAIN, WHOLE) else self.shape.vocab_size for n in names}
        parts = [
            step_memory(
                *(self.shape, counts[n], n != PLAIN, n == TEACHER, self.half, n == FROZEN),
                drawn_rows=words[n],
            )
            for n in names
        ]
        kept = sum(part["weights and optimizer"] + part["teacher"] for part in parts)
        return MARGIN * (kept + max(part["activations or gradients"] for part in parts))

    def check(self, names: Sequence[str], free: float) -> None:
        """Refuse trainings that do not fit into ``free`` bytes together, and say what would."""
        needed = self.total(names)
        if needed <= free:
            return
        advice = ", or ".join(self._advice(names, free))
        raise ValueError(
            f"{len(names)} training{'s' * (len(names) > 1)} ({', '.join(names)}) of this model "
            f"would take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. To fix, "
            f"{advice or 'choose a smaller model, or a machine with more memory'}."
        )

    def _advice(self, names: Sequence[str], free: float) -> Iterator[str]:
        ordered = [name for name in TRAININGS if name in names]
        subsets = (s for n in range(len(names) - 1, 0, -1) for s in combinations(ordered, n))
        if fewer := next((s for s in subsets if self.total(s) <= free), None):
            yield f"pass --trainings {' '.join(fewer)} ({self.total(fewer) / 1e9:.1f} GB)"
        halvings = ((self.tokens >> n, self.padded >> n) for n in range(1, HALVINGS))
        halved = (replace(self, tokens=real, padded=padded) for real, padded in halvings)
        if smaller := next((h for h in halved if h.tokens and h.total(names) <= free), None):
            yield (
                f"lower --batch-size, --max-length and --fixed-length to {smaller.padded:,} tokens "
                f"a batch (now {self.padded:,})"
            )


@dataclass(frozen=True)
class StepCost:
    """Steps of one training on one kind of batches.

    Attributes:
        seconds: Time of every step, from the rows of its batch to changed weights.
        data_seconds: The part of it in which the batch is made.
        tokens: Real tokens of every step.
        flops: Operations for the real tokens of all steps, without teacher and padding.
        peak_bytes: Peak of tensors in the widest step, without weights and optimizer state.
    """

    training: str
    batches: str
    seconds: list[float]
    data_seconds: list[float]
    tokens: list[int]
    padding: float
    flops: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second over all steps."""
        return sum(self.tokens) / sum(self.seconds)

    def as_dict(self, peak_flops: float) -> dict[str, Any]:
        """Return JSON-ready values, with operations per second as a share of ``peak_flops``."""
        return {
            **asdict(self),
            "median_seconds": float(np.median(self.seconds)),
            "data_share": sum(self.data_seconds) / sum(self.seconds),
            "tokens_per_second": self.tokens_per_second,
            "utilisation": self.flops / sum(self.seconds) / peak_flops,
        }


def load_model(name: str, texts: Sequence[str]) -> BaseModel:
    """Load the model to train; a configuration (``.yaml``) stands for random weights of its size.

    Every word of the texts is a token of a model of random weights, so that texts have about the
    lengths that a real tokenizer gives them.
    """
    if not name.endswith(".yaml"):
        return load_base_model(name)
    words = dict.fromkeys(word for text in texts for word in text.split())
    return random_base_model(build_plan(load_config([name])).source, name, list(words))


def measure_training(
    base: BaseModel,
    texts: TokenizedTexts,
    batch_size: int,
    length: int,
    steps: int,
    device: str = "cpu",
    autocast: bool = False,
    names: Sequence[str] = USUAL,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure trainings on all kinds of batches, and summarise them.

    The weights of ``base`` are trained: do not use it afterwards. The texts have mixed lengths, and
    ``length`` is that of texts of fixed length. With ``autocast`` products run in bfloat16. A line
    about each kind of batches is passed to ``report``.

    Raises:
        ValueError: If there are too few texts or there is too little memory.
    """
    pad, shape = base.hf_config["pad_token_id"], base.shape
    with TemporaryDirectory(prefix="training-benchmark-") as folder:
        sizes = (batch_size, length, steps, pad, shape.hidden_size)
        kinds = make_batches(texts, *sizes, Path(folder), device)
        tokens = max(int(batches.lengths.sum(axis=1).max()) for batches in kinds.values())
        padded = max(int(batches.padded.max()) for batches in kinds.values())
        free = model_analysis.free_bytes(device)
        if torch.device(device).type != "cuda":
            # The model is in memory already, and becomes that of the last training.
            free += 4 * int(count_parameters(shape).total)
        MemoryNeed(shape, tokens, padded, autocast).check(names, free)
        peaks = [measure_flops(device, autocast)]
        trainings = make_trainings(base, device, autocast, names)
        costs = []
        for kind, batches in kinds.items():
            report(f"{kind}: {steps} steps of {', '.join(names)}")
            costs += _measure_kind(kind, batches, trainings, shape)
            peaks.append(measure_flops(device, autocast))
    return summarise(costs, max(peaks))


def _measure_kind(
    kind: str, batches: TextBatches, trainings: dict[str, Training], shape: EncoderShape
) -> list[StepCost]:
    lengths, padded = batches.lengths, batches.padded
    widest, narrowest = int(padded.argmax()), int(padded.argmin())
    steps = {name: partial(_timed_step, each, batches) for name, each in trainings.items()}
    for step in steps.values():  # warms up; compiles for one size, and then for any
        step(widest)
        step(narrowest)
    found = model_analysis.take_turns(steps, lambda done: done < len(padded))
    flops = 3.0 * sum(forward_flops(shape, row) for row in lengths.tolist())
    return [
        StepCost(
            training=name,
            batches=kind,
            seconds=[whole for _, whole in found[name]],
            data_seconds=[data for data, _ in found[name]],
            tokens=lengths.sum(axis=1).tolist(),
            padding=1.0 - float(lengths.sum() / padded.sum()),
            flops=flops,
            peak_bytes=model_analysis.measure_peak_bytes(
                partial(training.step, batches.make(widest, training.cached)), batches.device
            ),
        )
        for name, training in trainings.items()
    ]


def _timed_step(training: Training, batches: TextBatches, index: int) -> tuple[float, float]:
    """Return the seconds of making a batch, and of the whole step."""
    model_analysis.wait_for(batches.device)
    started = time.perf_counter()
    batch = batches.make(index, training.cached)
    made = time.perf_counter()
    training.step(batch)
    model_analysis.wait_for(batches.device)
    return made - started, time.perf_counter() - started


def measure_flops(device: str, autocast: bool) -> float:
    """Measure the operations per second of a large matrix product, in the fastest of some rounds.

    Other work on the machine can only slow a round down, and make utilisation look better. With
    ``autocast`` the product is in bfloat16.
    """
    size, repeats = GPU_PRODUCT if torch.device(device).type == "cuda" else CPU_PRODUCT
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if autocast else torch.float32)
    out = torch.empty_like(a)

    def multiply() -> None:
        for _ in range(repeats):
            torch.matmul(a, a, out=out)

    seconds = [model_analysis.timed(multiply, device) for _ in range(WARM_UPS + PRODUCT_ROUNDS)]
    return 2.0 * size**3 * repeats / min(seconds[WARM_UPS:])


def summarise(costs: Sequence[StepCost], peak_flops: float) -> dict[str, Any]:
    """Return medians and ratios, JSON-ready, of the same trainings on every kind of batches.

    ``scripts/benchmark_training.py`` describes the keys. A ratio is taken on the same batch, where
    both trainings were measured. The extra time of ``reading`` cached vectors says more than a
    ratio of steps where it is less than the steps vary.
    """
    found = {(cost.training, cost.batches): cost for cost in costs}
    kinds = list(dict.fromkeys(cost.batches for cost in costs))
    throughput, reading = {}, {}
    if {(PLAIN, RANDOM), (GATES, RANDOM)} <= found.keys():
        speeds = {kind: found[GATES, kind].tokens_per_second for kind in (RANDOM, GROUPED)}
        reference = found[PLAIN, RANDOM].tokens_per_second
        throughput = {kind: speed / reference for kind, speed in speeds.items()}
    for kind in kinds:
        if {(CACHED, kind), (GATES, kind)} <= found.keys():
            cached, gates = found[CACHED, kind], found[GATES, kind]
            extra = np.subtract(cached.data_seconds, gates.data_seconds)
            reading[kind] = _quartiles(extra, gates.seconds)
    return {
        "peak_flops": peak_flops,
        "costs": [cost.as_dict(peak_flops) for cost in costs],
        "ratios": {
            kind: {
                name: _quartiles(found[name, kind].seconds, found[other, kind].seconds)
                for name, other in RATIOS.items()
                if {(name, kind), (other, kind)} <= found.keys()
            }
            for kind in kinds
        },
        "reading": reading,
        "throughput": throughput,
        "limits": {**LIMITS, "throughput": THROUGHPUT_GOAL},
    }


def _quartiles(seconds: ArrayLike, others: ArrayLike) -> list[float]:
    return np.percentile(np.divide(seconds, others), [25, 50, 75]).tolist()
