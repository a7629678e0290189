"""How fast a model is beside its baseline, and how much of the ideal speed-up that is.

The ideal is the ratio of floating-point operations: what a machine would reach that is limited by
its arithmetic alone. Model and baseline take turns in one process, so that a busy machine slows
both alike, and a ratio is the median over turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.evaluation.cost import weight_bytes
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.encoder_shape import EncoderShape, forward_flops
from bge_pruning.models.precision import DTYPES
from bge_pruning.models.pretrained import read_shape
from bge_pruning.utils.memory import measure_peak_bytes
from bge_pruning.utils.model_analysis import wait_for

# Quartiles of a ratio that are further apart than this share of it support no claim.
NOISY = 0.1
REAL = "real"
LEAST_ROUNDS = 5

Encoder = TextEncoder | OnnxEncoder


@dataclass(frozen=True)
class Setting:
    """What is embedded at once.

    Attributes:
        batch_size: Texts.
        length: Tokens of each, or ``REAL`` for texts as they are.
    """

    batch_size: int
    length: int | str


def shape_of(encoder: Encoder) -> EncoderShape:
    """Sizes of an encoder's model."""
    return encoder.base.shape if isinstance(encoder, TextEncoder) else read_shape(encoder.folder)


def prepare(encoder: Any, dtype: str, compiled: bool) -> Encoder:
    """An encoder in another precision or compiled, in place.

    Args:
        encoder: See :func:`bge_pruning.evaluation.encoders.load_encoder`.
        dtype: A name of :data:`bge_pruning.models.precision.DTYPES`.
        compiled: Compile the encoder.

    Raises:
        ValueError: If it is no XLM-R model, or an ONNX file is to be changed.
    """
    if isinstance(encoder, OnnxEncoder) and (dtype != "fp32" or compiled):
        raise ValueError(
            f"{encoder.name}: an ONNX file has its own precision and runtime. To fix, leave "
            f"--dtype and --compile out."
        )
    if not isinstance(encoder, TextEncoder | OnnxEncoder):
        raise ValueError(
            f"{encoder.name}: is no XLM-R model, so its operations cannot be counted. To fix, "
            f"measure it with evaluate_model.py."
        )
    if isinstance(encoder, TextEncoder):
        encoder.backbone.to(DTYPES[dtype])
        encoder.heads.to(DTYPES[dtype])
        if compiled:
            encoder.backbone.compile()
    return encoder


def measure_efficiency(
    model: Encoder,
    baseline: Encoder | None,
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    texts: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Measure all settings.

    Args:
        model: The model to judge.
        baseline: See :func:`measure_setting`.
        batch_sizes: Texts at once.
        lengths: Tokens of a text; those that are beyond either model's limit are left out.
        texts: Texts for real lengths too, if there are any.
        seconds: Of each setting.

    Returns:
        ``settings``, see :func:`measure_setting`; ``left_out`` lengths; ``threads`` of torch; and
        ``weight_bytes`` of each model.
    """
    both = {"model": model} | ({} if baseline is None else {"baseline": baseline})
    limit = min(encoder.max_length for encoder in both.values())
    kept: list[int | str] = [length for length in lengths if length <= limit]
    settings = [
        Setting(size, length) for length in kept + ([REAL] if texts else []) for size in batch_sizes
    ]
    return {
        "settings": [measure_setting(model, baseline, s, texts, seconds) for s in settings],
        "left_out": [length for length in lengths if length > limit],
        "threads": torch.get_num_threads(),
        "weight_bytes": {name: weight_bytes(encoder) for name, encoder in both.items()},
    }


def measure_setting(
    model: Encoder,
    baseline: Encoder | None,
    setting: Setting,
    texts: Sequence[str],
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Measure one setting.

    Args:
        model: The model to judge.
        baseline: What it is judged by, on the same device; ``None`` to measure the model alone.
        setting: What is embedded at once.
        texts: Texts for ``REAL`` lengths; as many as four batches are embedded, sorted by length.
        seconds: How long to measure; at least ``LEAST_ROUNDS`` turns are taken.

    Returns:
        ``batch_size``, ``length``, ``rounds``; for ``model`` and ``baseline`` ``latency_ms``
        (``median``, ``p95`` of one call), ``texts_per_s``, ``tokens_per_s``, ``gflops_per_token``
        and ``activation_bytes`` (``None`` for ONNX); and ``speedup`` with its quartiles, ``ideal``,
        ``share`` of it, and ``noisy``, whether the spread supports no claim.
    """
    both = {"model": model} | ({} if baseline is None else {"baseline": baseline})
    jobs, lengths = {}, {}
    for name, encoder in both.items():
        jobs[name], lengths[name] = _job(encoder, setting, texts)
    spent = _take_turns(jobs, seconds, str(model.device))
    result: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "length": setting.length,
        "rounds": len(spent["model"]),
    }
    for name, encoder in both.items():
        result[name] = _describe(encoder, jobs[name], lengths[name], spent[name])
    if baseline is not None:
        flops = {name: forward_flops(shape_of(both[name]), lengths[name]) for name in both}
        ideal = flops["baseline"] / flops["model"]
        low, median, high = np.percentile(
            np.divide(spent["baseline"], spent["model"]), [25, 50, 75]
        ).tolist()
        result |= {
            "speedup": {"median": median, "quartiles": [low, high]},
            "ideal": ideal,
            "share": median / ideal,
            "noisy": (high - low) / median > NOISY,
        }
    return result


def _job(
    encoder: Encoder, setting: Setting, texts: Sequence[str]
) -> tuple[Callable[[], object], list[int]]:
    """What to time, and the lengths of what it embeds."""
    if setting.length == REAL:
        chosen = list(texts[: 4 * setting.batch_size])
        encoder.batch_size = setting.batch_size
        return lambda: encoder.encode(chosen), encoder.tokenize(chosen).lengths.tolist()
    ids, mask = _fixed(encoder, setting)
    lengths = [int(setting.length)] * setting.batch_size

    @torch.inference_mode()
    def compute() -> dict[str, Tensor]:
        return encoder.compute(ids, mask, ("dense_vecs",))

    return compute, lengths


def _fixed(encoder: Encoder, setting: Setting) -> tuple[Tensor, Tensor]:
    """Token ids that are no special ones, and a mask without padding."""
    generator = torch.Generator().manual_seed(0)
    size = (setting.batch_size, int(setting.length))
    first = min(max(encoder.special_ids, default=0) + 1, encoder.vocab_size - 1)
    if first > encoder.vocab_size // 2:  # special tokens at the end of the vocabulary
        first = min(encoder.pad_token_id + 1, encoder.vocab_size - 1)
    ids = torch.randint(first, encoder.vocab_size, size, generator=generator).to(encoder.device)
    return ids, torch.ones_like(ids)


def _take_turns(
    jobs: dict[str, Callable[[], object]], seconds: float, device: str
) -> dict[str, list[float]]:
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for name in names:
        jobs[name]()  # warm
    started = time.perf_counter()
    while len(spent[names[0]]) < LEAST_ROUNDS or time.perf_counter() - started < seconds:
        for name in names:
            wait_for(device)
            begin = time.perf_counter()
            jobs[name]()
            wait_for(device)
            spent[name].append(time.perf_counter() - begin)
        names.reverse()
    return spent


def _describe(
    encoder: Encoder, job: Callable[[], object], lengths: Sequence[int], spent: Sequence[float]
) -> dict[str, Any]:
    median = float(np.median(spent))
    activations = None if isinstance(encoder, OnnxEncoder) else measure_peak_bytes(job)
    return {
        "latency_ms": {"median": 1e3 * median, "p95": 1e3 * float(np.percentile(spent, 95))},
        "texts_per_s": len(lengths) / median,
        "tokens_per_s": sum(lengths) / median,
        "gflops_per_token": forward_flops(shape_of(encoder), lengths) / sum(lengths) / 1e9,
        "activation_bytes": activations,
    }
