"""What a pruning step costs beside a step of plain fine-tuning, on the same batches.

The trainings of :mod:`bge_pruning.workflows.benchmark_trainings` take turns on every batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
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
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.models.encoder_shape import (
    EncoderShape,
    count_parameters,
    forward_flops,
    step_memory,
)
from bge_pruning.reports.efficiency_table import LIMITS, RATIOS, THROUGHPUT_GOAL, UNCOMPILED
from bge_pruning.training.plan import build_plan
from bge_pruning.utils.model_analysis import free_bytes, measure_peak_bytes, take_turns, wait_for
from bge_pruning.utils.records import CACHED, COMPILED, GATES, PLAIN, TEACHER, TRAININGS
from bge_pruning.workflows.random_model import random_base_model
from bge_pruning.workflows.training_batches import (
    GROUPED,
    RANDOM,
    TextBatches,
    Training,
    make_batches,
    make_trainings,
)

HALVINGS = 12
# What the allocator keeps; a process of BGE-M3's size grew to 1.05 times the sum of its tensors.
MARGIN = 1.1


def compute_needed_bytes(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool
) -> float:
    """Bytes that trainings need that take turns.

    Each keeps its weights and moments; activations and gradients are there of one at a time.

    Args:
        shape: Sizes of the model.
        names: Of the trainings.
        tokens: Real tokens of the largest batch; ours computes nothing for the others.
        padded: With its padding.
        half: With 16-bit autocast.
    """
    # Compiled layers compute padding too where there is no kernel for texts of any lengths.
    counts = {n: padded if n in (PLAIN, COMPILED) else tokens for n in names}
    parts = [step_memory(shape, counts[n], n != PLAIN, n == TEACHER, half) for n in names]
    kept = sum(part["weights and optimizer"] + part["teacher"] for part in parts)
    return MARGIN * (kept + max(part["activations or gradients"] for part in parts))


def check_memory(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool, free: float
) -> None:
    """Refuse trainings that do not fit together.

    Args:
        shape: Sizes of the model.
        names: Of the trainings.
        tokens: Real tokens of the largest batch.
        padded: With its padding.
        half: With 16-bit autocast.
        free: Bytes that they may take.

    Raises:
        ValueError: If they do not fit; the message says what would.
    """
    needed = compute_needed_bytes(shape, names, tokens, padded, half)
    if needed <= free:
        return
    advice = [
        *_fewer_trainings(shape, names, tokens, padded, half, free),
        *_smaller_batches(shape, names, tokens, padded, half, free),
    ] or ["choose a smaller model, or a machine with more memory"]
    raise ValueError(
        f"{len(names)} training{'s' * (len(names) > 1)} ({', '.join(names)}) of this model would "
        f"take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. To fix, "
        f"{', or '.join(advice)}."
    )


def _fewer_trainings(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool, free: float
) -> Iterator[str]:
    ordered = [name for name in TRAININGS if name in names]
    for count in range(len(names) - 1, 0, -1):
        for fewer in combinations(ordered, count):
            needed = compute_needed_bytes(shape, fewer, tokens, padded, half)
            if needed <= free:
                yield f"pass --trainings {' '.join(fewer)} ({needed / 1e9:.1f} GB)"
                return


def _smaller_batches(
    shape: EncoderShape, names: Sequence[str], tokens: int, padded: int, half: bool, free: float
) -> Iterator[str]:
    for power in range(1, HALVINGS):
        less = [count >> power for count in (tokens, padded)]
        if min(less) and compute_needed_bytes(shape, names, *less, half) <= free:
            yield (
                f"lower --batch-size, --max-length and --fixed-length to {less[1]:,} tokens a "
                f"batch (now {padded:,})"
            )
            return


# A product's rows and columns, and how many are timed in one go: a GPU needs large ones, and many
# for the time of a call not to count.
CPU_PRODUCT, GPU_PRODUCT = (2048, 1), (8192, 20)
PRODUCT_ROUNDS, WARM_UPS = 9, 3


@dataclass(frozen=True)
class StepCost:
    """Steps of one training on one kind of batches.

    Attributes:
        training: A name of ``TRAININGS``.
        batches: ``FIXED``, ``RANDOM`` or ``GROUPED``.
        seconds: Of every step, from the rows of its batch to changed weights.
        data_seconds: The part of it in which the batch is made.
        tokens: Real tokens of every step.
        padding: Share of padding over all steps.
        flops: Operations that the trained model needs for the real tokens of all steps; teacher
            and padding not counted.
        peak_bytes: The most that tensors take in the step of the widest batch, beside weights and
            optimizer state; of the device on a GPU.
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
        """For JSON, with ``utilisation``: operations per second as a share of a peak.

        Args:
            peak_flops: Operations per second of a large product.
        """
        return {
            **asdict(self),
            "median_seconds": float(np.median(self.seconds)),
            "data_share": sum(self.data_seconds) / sum(self.seconds),
            "tokens_per_second": self.tokens_per_second,
            "utilisation": self.flops / sum(self.seconds) / peak_flops,
        }


def load_model(name: str, texts: Sequence[str]) -> BaseModel:
    """The model to train.

    Args:
        name: Folder, hub name, or a configuration (``.yaml``): random weights of its model's size.
        texts: Every word of them is a token of a model of random weights, so that texts have about
            the lengths that a real tokenizer gives them.

    Raises:
        ConfigError: If the configuration is wrong.
        FileNotFoundError: If the model is not there.
        ValueError: If its files are wrong.
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
    names: Sequence[str] = UNCOMPILED,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure trainings on all kinds of batches.

    Args:
        base: The model. Its weights are trained: do not use it any more.
        texts: Texts of mixed lengths.
        batch_size: Texts of a batch.
        length: Tokens of a text of fixed length.
        steps: Steps of each training on each kind of batches.
        device: Torch device.
        autocast: Run products in bfloat16.
        names: Names of the trainings.
        report: Called with a line about each kind of batches.

    Returns:
        See :func:`summarise`.

    Raises:
        ValueError: If there are too few texts or there is too little memory.
    """
    pad, shape = base.hf_config["pad_token_id"], base.shape
    with TemporaryDirectory(prefix="training-benchmark-") as folder:
        place = Path(folder)
        kinds = make_batches(
            texts, batch_size, length, steps, pad, shape.hidden_size, place, device
        )
        _check(shape, names, kinds, device, autocast)
        peaks = [measure_flops(device, autocast)]
        trainings = make_trainings(base, device, autocast, names)
        costs = []
        for kind, batches in kinds.items():
            report(f"{kind}: {steps} steps of {', '.join(names)}")
            costs += _measure_kind(kind, batches, trainings, shape)
            peaks.append(measure_flops(device, autocast))
    return summarise(costs, max(peaks))


def _check(
    shape: EncoderShape,
    names: Sequence[str],
    kinds: dict[str, TextBatches],
    device: str,
    autocast: bool,
) -> None:
    free = free_bytes(device)
    if torch.device(device).type != "cuda":
        free += 4 * int(count_parameters(shape).total)  # the model is there, and becomes the last
    tokens = max(int(batches.lengths.sum(axis=1).max()) for batches in kinds.values())
    padded = max(int(batches.padded.max()) for batches in kinds.values())
    check_memory(shape, names, tokens, padded, autocast, free)


def _measure_kind(
    kind: str, batches: TextBatches, trainings: dict[str, Training], shape: EncoderShape
) -> list[StepCost]:
    timed = _take_turns(trainings, batches)
    lengths = batches.lengths
    flops = 3.0 * sum(forward_flops(shape, row) for row in lengths.tolist())
    return [
        StepCost(
            training=name,
            batches=kind,
            seconds=[whole for _, whole in timed[name]],
            data_seconds=[data for data, _ in timed[name]],
            tokens=lengths.sum(axis=1).tolist(),
            padding=1.0 - float(lengths.sum() / batches.padded.sum()),
            flops=flops,
            peak_bytes=_peak_bytes(training, batches),
        )
        for name, training in trainings.items()
    ]


def _take_turns(
    trainings: dict[str, Training], batches: TextBatches
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every step, see :func:`_timed_step`; the trainings take turns to go first."""
    for training in trainings.values():  # warm; compiles for one size, and for any
        for index in (batches.widest, batches.narrowest):
            _timed_step(training, batches, index)
    steps = {name: partial(_timed_step, each, batches) for name, each in trainings.items()}
    return take_turns(steps, lambda done: done < len(batches))


def _timed_step(training: Training, batches: TextBatches, index: int) -> tuple[float, float]:
    """Seconds of making the batch, and of all of the step."""
    wait_for(batches.device)
    started = time.perf_counter()
    batch = batches.make(index, training.cached)
    made = time.perf_counter()
    training.step(batch)
    wait_for(batches.device)
    return made - started, time.perf_counter() - started


def _peak_bytes(training: Training, batches: TextBatches) -> int:
    batch = batches.make(batches.widest, training.cached)
    return measure_peak_bytes(lambda: training.step(batch), batches.device)


def measure_flops(device: str, autocast: bool) -> float:
    """Operations per second of a large matrix product: the fastest of some rounds.

    What else runs on the machine can only make a round slower, and utilisation look better.

    Args:
        device: Torch device.
        autocast: In bfloat16.
    """
    size, repeats = GPU_PRODUCT if torch.device(device).type == "cuda" else CPU_PRODUCT
    dtype = torch.bfloat16 if autocast else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    seconds = []
    for _ in range(WARM_UPS + PRODUCT_ROUNDS):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, a, out=out)
        wait_for(device)
        seconds.append((time.perf_counter() - started) / repeats)
    return 2.0 * size**3 / min(seconds[WARM_UPS:])


def summarise(costs: Sequence[StepCost], peak_flops: float) -> dict[str, Any]:
    """Medians and ratios, JSON-ready.

    Args:
        costs: Measurements of the same trainings on every kind of batches.
        peak_flops: Operations per second of a large product, the fastest that was seen.

    Returns:
        ``peak_flops``; ``costs``; ``ratios`` by kind of batches and training: quartiles of its step
        time in times of the other's that ``RATIOS`` names, on the same batch, where both were
        measured; ``reading`` by kind of batches: quartiles of what a batch takes longer to make
        with the cache, as a share of a step of gates, which says more than a ratio of steps where
        that is less than they vary; ``throughput``: tokens per second of gates by kind, in times of
        plain fine-tuning on random batches, if both were measured; ``limits`` of both.
    """
    found = {(cost.training, cost.batches): cost for cost in costs}
    ratios = {
        kind: {
            name: _quartiles(found[name, kind].seconds, found[other, kind].seconds)
            for name, other in RATIOS.items()
            if (name, kind) in found and (other, kind) in found
        }
        for kind in dict.fromkeys(cost.batches for cost in costs)
    }
    throughput = {}
    if (PLAIN, RANDOM) in found and (GATES, RANDOM) in found:
        reference = found[PLAIN, RANDOM].tokens_per_second
        throughput = {
            kind: found[GATES, kind].tokens_per_second / reference for kind in (RANDOM, GROUPED)
        }
    return {
        "peak_flops": peak_flops,
        "costs": [cost.as_dict(peak_flops) for cost in costs],
        "ratios": ratios,
        "reading": {
            kind: _reading(found[CACHED, kind], found[GATES, kind])
            for kind in ratios
            if (CACHED, kind) in found and (GATES, kind) in found
        },
        "throughput": throughput,
        "limits": {**LIMITS, "throughput": THROUGHPUT_GOAL},
    }


def _reading(cached: StepCost, gates: StepCost) -> list[float]:
    return _quartiles(np.subtract(cached.data_seconds, gates.data_seconds), gates.seconds)


def _quartiles(seconds: ArrayLike, others: ArrayLike) -> list[float]:
    return np.percentile(np.divide(seconds, others), [25, 50, 75]).tolist()
