"""Measures how fast a model is beside its baseline, and how near that is to the ideal speed-up.

The ideal is the ratio of floating-point operations, which a machine limited by arithmetic alone
would reach. Runs of model and baseline are interleaved in one process, so that a busy machine slows
both alike, and a ratio is the median over rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.datasets.mixed_dataloader import BATCH_TOKENS, batch_indices
from bge_pruning.evaluation.evaluate import weight_bytes
from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.model_io.pretrained import read_shape
from bge_pruning.models.encoder_shape import EncoderShape, forward_flops
from bge_pruning.utils.model_analysis import free_bytes, measure_peak_bytes, take_turns, timed

log = logging.getLogger(__name__)

TORCH, COMPILE, ONNX = RUNTIMES = ("torch", "compile", "onnx")
REAL = "real"
# A ratio whose quartiles are further apart than this share of it is called noisy.
NOISY = 0.1
# Least rounds; fewer, and a noisy result, if the first took SLOW times as long as a setting may.
LEAST_ROUNDS, FEWEST_ROUNDS, SLOW = 5, 2, 4.0
# Real texts that a call embeds: this many batches, and at least this many texts.
REAL_BATCHES, REAL_TEXTS = 4, 16
# Largest share of the free memory that a setting may need.
SPARE = 0.9

Encoder = TextEncoder | OnnxEncoder


@dataclass(frozen=True)
class Setting:
    """What is embedded at once, and by what."""

    batch_size: int
    length: int | str  # tokens of each text, or REAL for real texts of their own lengths
    runtime: str = TORCH


@dataclass(frozen=True)
class Job:
    """One call of a model."""

    run: Callable[[], object]
    lengths: list[int]
    batches: list[tuple[int, int]]  # texts, and tokens of the longest


def shape_of(encoder: Encoder) -> EncoderShape:
    """Sizes of an encoder's model."""
    return encoder.base.shape if isinstance(encoder, TextEncoder) else read_shape(encoder.folder)


def compile_encoder(encoder: Encoder) -> None:
    """Compile an encoder in place, for the shapes that it is called with from now on."""
    torch.compiler.reset()
    encoder.backbone.compile_encoder(training=False)


def measure_efficiency(
    opened: Mapping[str, Mapping[str, Encoder]],
    batch_sizes: Sequence[int],
    lengths: Sequence[int],
    texts: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    """Measure all settings.

    Args:
        opened: By runtime, in the order of ``RUNTIMES``: the ``model`` to judge and, if there is
            one, its ``baseline``. Those of ``COMPILE``, which may be those of ``TORCH``, are
            compiled in place.
        lengths: Tokens of a text; lengths beyond either model's limit are left out.
        seconds: Time for each setting.

    Returns:
        ``settings``: ``runtime`` and what :func:`measure_setting` finds. ``saturation``: see
        :func:`find_saturation`. ``weight_bytes`` by runtime and model. ``threads`` of torch.
        ``max_length``: the limit in tokens; ``too_long``: the lengths beyond it. ``too_large``:
        ``runtime``, ``batch_size`` and ``length`` of the settings that do not fit in memory, with
        ``needed_bytes``, an estimate, and ``free_bytes``.
    """
    limit = min(encoder.max_length for models in opened.values() for encoder in models.values())
    kept = [length for length in lengths if length <= limit] + ([REAL] if texts else [])
    found, too_large = [], []
    for runtime, models in opened.items():
        for setting in (Setting(size, length, runtime) for length in kept for size in batch_sizes):
            jobs = {name: _job(encoder, setting, texts) for name, encoder in models.items()}
            place = {"runtime": runtime, "batch_size": setting.batch_size, "length": setting.length}
            memory = _memory(models, jobs, runtime)
            if memory["needed_bytes"] > SPARE * memory["free_bytes"]:
                too_large.append(place | memory)
                continue
            log.info("%s: %d x %s tokens", runtime, setting.batch_size, setting.length)
            found.append(place | measure_setting(models, setting, texts, seconds))
    return {
        "settings": found,
        "saturation": find_saturation(found),
        "weight_bytes": {
            runtime: {name: weight_bytes(encoder) for name, encoder in models.items()}
            for runtime, models in opened.items()
        },
        "threads": torch.get_num_threads(),
        "max_length": limit,
        "too_long": [length for length in lengths if length > limit],
        "too_large": too_large,
    }


def measure_setting(
    models: Mapping[str, Encoder], setting: Setting, texts: Sequence[str], seconds: float = 10.0
) -> dict[str, Any]:
    """Measure one setting.

    With real lengths a call embeds four batches or more of texts that are spread over all given
    ones and sorted by length; its time includes tokenising them.

    Args:
        seconds: How long to measure; there are at least ``LEAST_ROUNDS`` rounds, or
            ``FEWEST_ROUNDS`` where a round takes ``SLOW`` times as long.

    Returns:
        ``batch_size``, ``length``, ``rounds``; for ``model`` and ``baseline`` ``latency_ms``
        (``median``, ``p95``, of a batch: the mean of a call's), ``tokens_per_text`` (their mean),
        ``texts_per_s``, ``tokens_per_s``, ``gflops_per_token`` and ``activation_bytes`` (``None``
        for ONNX, and compiled on the CPU, which keep them to themselves). With a baseline also
        ``speedup`` (``median`` and ``quartiles``), ``ideal``, ``share`` of it, and ``noisy``:
        whether the spread is too large or the rounds are too few to support a claim.
    """
    if setting.runtime == COMPILE:
        for encoder in models.values():
            compile_encoder(encoder)
    jobs = {name: _job(encoder, setting, texts) for name, encoder in models.items()}
    spent = _take_turns(jobs, seconds, str(models["model"].device))
    result: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "length": setting.length,
        "rounds": len(spent["model"]),
    }
    for name, encoder in models.items():
        activations = _activation_bytes(encoder, jobs[name], setting.runtime)
        result[name] = _describe(shape_of(encoder), jobs[name], spent[name]) | activations
    return result | (_compare(models, jobs, spent) if "baseline" in models else {})


def find_saturation(settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Find the setting with most tokens per second, by runtime and model."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        best = found.setdefault(setting["runtime"], {})
        for name in ("model", "baseline"):
            rate = setting.get(name, {}).get("tokens_per_s", 0.0)
            if rate > best.get(name, {}).get("tokens_per_s", 0.0):
                keys = ("texts_per_s", "tokens_per_s")
                best[name] = {key: setting[key] for key in ("batch_size", "length")} | {
                    key: setting[name][key] for key in keys
                }
    return found


def estimate_activations(shape: EncoderShape, texts: int, tokens: int, runtime: str) -> float:
    """Estimate how many numbers are in memory at most while a batch is embedded.

    A token's hidden states before and in a layer, and the wider half of the layer: queries, keys,
    values and their products, or the units before and after the activation. The ONNX graph also
    holds the attention of every pair of tokens before and after the softmax.
    """
    inner = shape.num_attention_heads * shape.head_dim
    halves = (6 * inner, shape.hidden_size + 2 * shape.intermediate_size)
    values = 2.0 * shape.hidden_size + max(halves)
    if runtime == ONNX:
        values += 2.0 * shape.num_attention_heads * tokens
    return texts * tokens * values


def _memory(models: Mapping[str, Encoder], jobs: Mapping[str, Job], runtime: str) -> dict[str, int]:
    """Bytes that the largest batches need, and bytes that are free."""
    needed = []
    for name, encoder in models.items():
        shape, batches = shape_of(encoder), jobs[name].batches
        numbers = max(estimate_activations(shape, *batch, runtime) for batch in batches)
        needed.append(_number_bytes(encoder) * numbers)
    # ONNX Runtime frees nothing before its model is deleted.
    total = sum(needed) if runtime == ONNX else max(needed)
    return {"needed_bytes": int(total), "free_bytes": free_bytes(str(models["model"].device))}


def _number_bytes(encoder: Encoder) -> int:
    if isinstance(encoder, OnnxEncoder):
        return 4
    return encoder.backbone.embeddings.word_embeddings.weight.element_size()


def _job(encoder: Encoder, setting: Setting, texts: Sequence[str]) -> Job:
    if setting.length == REAL:
        return _real_job(encoder, setting.batch_size, texts)
    size, length = setting.batch_size, int(setting.length)
    ids, mask = _fixed(encoder, size, length)

    @torch.inference_mode()
    def compute() -> dict[str, Tensor]:
        return encoder.compute(ids, mask, ("dense_vecs",))

    return Job(compute, [length] * size, [(size, length)])


def _real_job(encoder: Encoder, batch_size: int, texts: Sequence[str]) -> Job:
    count = min(len(texts), max(REAL_BATCHES * batch_size, REAL_TEXTS))
    prompt = find_prompt(encoder.prompts, "text")
    chosen = [prompt + texts[index * len(texts) // count] for index in range(count)]
    encoder.batch_size = batch_size
    lengths = encoder.tokenize(chosen).lengths
    batches = [
        (len(index), int(lengths[index].max()))
        for index in batch_indices(lengths, batch_size, BATCH_TOKENS)
    ]
    return Job(lambda: encoder.encode(chosen), lengths.tolist(), batches)


def _fixed(encoder: Encoder, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids without special tokens, and a mask without padding."""
    generator = torch.Generator().manual_seed(0)
    first = min(max(encoder.special_ids, default=0) + 1, encoder.vocab_size - 1)
    if first > encoder.vocab_size // 2:  # special tokens at the end of the vocabulary
        first = min(encoder.pad_token_id + 1, encoder.vocab_size - 1)
    ids = torch.randint(first, encoder.vocab_size, (size, length), generator=generator)
    ids = ids.to(encoder.device)
    return ids, torch.ones_like(ids)


def _take_turns(jobs: Mapping[str, Job], seconds: float, device: str) -> dict[str, list[float]]:
    for job in jobs.values():
        job.run()  # warm; compiles for every shape of the job
    started, least = time.perf_counter(), LEAST_ROUNDS

    def another(done: int) -> bool:
        nonlocal least
        passed = time.perf_counter() - started
        if done == 1 and passed > SLOW * seconds:
            least = FEWEST_ROUNDS
        return done < least or passed < seconds

    timers = {name: lambda _, job=job: timed(job.run, device) for name, job in jobs.items()}
    return take_turns(timers, another)


def _describe(shape: EncoderShape, job: Job, spent: Sequence[float]) -> dict[str, Any]:
    median, tokens = float(np.median(spent)), sum(job.lengths)
    a_batch = 1e3 / len(job.batches)
    p95 = float(np.percentile(spent, 95))
    return {
        "latency_ms": {"median": a_batch * median, "p95": a_batch * p95},
        "tokens_per_text": tokens / len(job.lengths),
        "texts_per_s": len(job.lengths) / median,
        "tokens_per_s": tokens / median,
        "gflops_per_token": forward_flops(shape, job.lengths) / tokens / 1e9,
    }


def _activation_bytes(encoder: Encoder, job: Job, runtime: str) -> dict[str, int | None]:
    device = str(encoder.device)
    hidden = runtime == COMPILE and torch.device(device).type != "cuda"
    if hidden or isinstance(encoder, OnnxEncoder):
        return {"activation_bytes": None}
    return {"activation_bytes": measure_peak_bytes(job.run, device)}


def _compare(
    models: Mapping[str, Encoder], jobs: Mapping[str, Job], spent: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    flops = {
        name: forward_flops(shape_of(encoder), jobs[name].lengths)
        for name, encoder in models.items()
    }
    ideal = flops["baseline"] / flops["model"]
    ratios = np.divide(spent["baseline"], spent["model"])
    low, median, high = np.percentile(ratios, [25, 50, 75]).tolist()
    return {
        "speedup": {"median": median, "quartiles": [low, high]},
        "ideal": ideal,
        "share": median / ideal,
        "noisy": len(ratios) < LEAST_ROUNDS or (high - low) / median > NOISY,
    }
