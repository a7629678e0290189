"""What a model costs: its parameters, counted from the files, and its speed beside a baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PARTS = ("encoder", "embeddings", "pooler")
HEAD_FILES = ("colbert_linear.pt", "sparse_linear.pt")
# Index buffers, which older transformers stored beside the weights; they are no parameters.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def count_parameters(folder: str | Path) -> dict[str, int]:
    """Counts the parameters of a model folder by part, from the shapes in its files.

    Args:
        folder: Holds ``model.safetensors`` or ``pytorch_model.bin`` with the key names of
            ``XLMRobertaModel``, and ``colbert_linear.pt`` / ``sparse_linear.pt`` where the model
            has those heads.

    Returns:
        Parameters under ``encoder`` (the transformer layers), ``embeddings``, ``pooler``,
        ``heads``, ``total``.

    Raises:
        FileNotFoundError: If the folder has no weights file.
        ValueError: If a key belongs to no part.
    """
    folder = Path(folder)
    counts = count_by_part(_read_sizes(folder))
    for name in HEAD_FILES:
        if (folder / name).is_file():
            counts["heads"] += sum(_read_torch_sizes(folder / name).values())
    counts["total"] = sum(counts[part] for part in (*PARTS, "heads"))
    return counts


def count_by_part(sizes: Mapping[str, int]) -> dict[str, int]:
    """Adds up parameters by part; heads are 0, as they have files of their own.

    Args:
        sizes: Parameters under each key of an ``XLMRobertaModel`` state dict.

    Returns:
        As ``count_parameters``.

    Raises:
        ValueError: If a key belongs to no part.
    """
    counts = dict.fromkeys((*PARTS, "heads", "total"), 0)
    unknown = [key for key in sizes if key.split(".")[0] not in PARTS]
    if unknown:
        raise ValueError(
            f"{len(unknown)} weights belong to no part of an XLMRobertaModel: "
            f"{', '.join(unknown[:3])}. To fix, save the bare encoder, whose keys start with "
            "encoder., embeddings. or pooler."
        )
    for key, size in sizes.items():
        if key not in BUFFERS:
            counts[key.split(".")[0]] += size
    counts["total"] = sum(counts.values())
    return counts


def _read_sizes(folder: Path) -> dict[str, int]:
    """Elements of each tensor of the folder's weights file."""
    from safetensors import safe_open

    if (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            return {key: prod(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    if (folder / "pytorch_model.bin").is_file():  # BGE-M3 as published
        return _read_torch_sizes(folder / "pytorch_model.bin")
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin. To fix, give the folder "
        "of a saved model."
    )


def _read_torch_sizes(path: Path) -> dict[str, int]:
    """Elements of each tensor of a file written by ``torch.save``."""
    import torch

    return {
        key: value.numel()
        for key, value in torch.load(path, map_location="meta", weights_only=True).items()
    }


def measure_speed(
    model: SentenceTransformer,
    baseline: SentenceTransformer,
    sentences: Sequence[str],
    *,
    batch_size: int = 32,
    rounds: int = 7,
    latency_texts: int = 50,
    throughput_texts: int = 256,
) -> dict[str, Any]:
    """Measures two models in turns, in one process, so that a busy machine slows both alike.

    Latency is the time of ``encode`` for one sentence; throughput is that of ``throughput_texts``
    sentences in batches of ``batch_size``, sorted by length (sentence-transformers sorts). Each
    model goes first every other time, after a warm-up. Every ratio is model / baseline: 0.5 is half
    the latency, 2 is twice the throughput.

    Args:
        model: The model to judge.
        baseline: What it is judged by, on the same device.
        sentences: At least one; a sample spread over the whole list is used.
        batch_size: Texts in a batch when throughput is measured.
        rounds: Throughput measurements of each model.
        latency_texts: Sentences timed alone, at most.
        throughput_texts: Sentences in a throughput measurement, at most.

    Returns:
        ``device``, ``threads`` (of torch on the CPU), ``latency_ms`` and
        ``throughput_texts_per_s``, with medians, the 95th percentile of the latency, and the first
        and third quartile of each ratio as ``ratio_iqr``.

    Raises:
        ValueError: If there are no sentences, ``rounds`` is not positive, or the devices differ.
    """
    import torch

    _check_speed_arguments(model, baseline, sentences, rounds)
    short, long = _sample(sentences, latency_texts), _sample(sentences, throughput_texts)
    for encoder in (model, baseline):
        encoder.encode(long[:batch_size], batch_size=batch_size, show_progress_bar=False)
        encoder.encode(short[0], show_progress_bar=False)
    alone = _time_in_turns(model, baseline, [lambda m, s=text: _encode(m, s, 1) for text in short])
    together = _time_in_turns(model, baseline, [lambda m: _encode(m, long, batch_size)] * rounds)
    return {
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "latency_ms": _summarise_latency(*alone),
        "throughput_texts_per_s": _summarise_throughput(*together, len(long)),
    }


def _check_speed_arguments(
    model: SentenceTransformer, baseline: SentenceTransformer, sentences: Sequence[str], rounds: int
) -> None:
    if not sentences:
        raise ValueError("no sentences to measure speed on. To fix, give at least one.")
    if rounds < 1:
        raise ValueError(f"rounds {rounds} measures nothing. To fix, use 1 or more.")
    if str(model.device) != str(baseline.device):
        raise ValueError(
            f"model is on {model.device} and baseline on {baseline.device}: their speeds cannot "
            "be compared. To fix, load both on one device."
        )


def _sample(sentences: Sequence[str], count: int) -> list[str]:
    """``count`` sentences at most, evenly spread, so that no part of a sorted list is left out."""
    if len(sentences) <= count:
        return list(sentences)
    return [sentences[index * len(sentences) // count] for index in range(count)]


def _encode(model: SentenceTransformer, texts: str | list[str], batch_size: int) -> None:
    # The result is a NumPy array, so an accelerator has finished when encode returns.
    model.encode(texts, batch_size=batch_size, show_progress_bar=False)


def _time_in_turns(
    model: SentenceTransformer,
    baseline: SentenceTransformer,
    jobs: Sequence[Callable[[SentenceTransformer], None]],
) -> tuple[list[float], list[float]]:
    """Seconds of each job with the model and with the baseline; they take turns to go first."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for index, job in enumerate(jobs):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            start = time.perf_counter()
            job((model, baseline)[which])
            seconds[which].append(time.perf_counter() - start)
    return seconds


def _summarise_latency(model: list[float], baseline: list[float]) -> dict[str, Any]:
    import numpy as np

    both = {"model": np.array(model), "baseline": np.array(baseline)}
    result: dict[str, Any] = {
        name: {
            "median": 1e3 * float(np.median(values)),
            "p95": 1e3 * float(np.percentile(values, 95)),
        }
        for name, values in both.items()
    }
    result["ratio"] = result["model"]["median"] / result["baseline"]["median"]
    result["ratio_iqr"] = np.percentile(both["model"] / both["baseline"], [25, 75]).tolist()
    return result


def _summarise_throughput(model: list[float], baseline: list[float], texts: int) -> dict[str, Any]:
    import numpy as np

    rates = texts / np.array([model, baseline])  # (2, rounds), texts per second
    medians = np.median(rates, axis=1)
    return {
        "model": float(medians[0]),
        "baseline": float(medians[1]),
        "ratio": float(medians[0] / medians[1]),
        "ratio_iqr": np.percentile(rates[0] / rates[1], [25, 75]).tolist(),
    }
