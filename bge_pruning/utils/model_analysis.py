"""Measure what a model costs: speed beside a baseline, and memory."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bge_pruning.utils.environment import OtherWork, load_note

T = TypeVar("T")


class Embedder(Protocol):
    """A model whose speed can be measured."""

    device: str
    batch_size: int

    def encode(self, texts: Sequence[str]) -> object:
        """Embed texts, sorted by length, and wait for the result."""


def measure_speed(
    model: Embedder,
    baseline: Embedder,
    sentences: Sequence[str],
    *,
    rounds: int = 7,
    latency_texts: int = 50,
    throughput_texts: int = 256,
) -> dict[str, Any]:
    """Measure two models interleaved, in one process, so that a busy machine slows both alike.

    Latency is the time of one sentence; throughput is that of ``throughput_texts`` sentences in
    batches, sorted by length. Samples spread over all sentences are used. Each model goes first
    every other time, after a warm-up. Every ratio is model / baseline: 0.5 is half the latency, 2
    is twice the throughput. Both are on the same device and have the same size of a batch.

    Returns:
        ``device``, ``threads`` (of torch on the CPU), ``batch_size``, ``load`` (what else the
        machine did, if that made the times longer), ``latency_ms``, and
        ``throughput_texts_per_s``, with medians, the 95th percentile of the latency, and the first
        and third quartile of each ratio as ``ratio_iqr``.
    """
    _check_speed_arguments(model, baseline, sentences, rounds)
    short, long = _sample(sentences, latency_texts), _sample(sentences, throughput_texts)
    for encoder in (model, baseline):
        encoder.encode(short[:1])
        encoder.encode(long[: encoder.batch_size])
    both = {"model": model, "baseline": baseline}.items()
    one = {name: lambda i, e=e: timed(lambda: e.encode([short[i]])) for name, e in both}
    many = {name: lambda _, e=e: timed(lambda: e.encode(long)) for name, e in both}
    with OtherWork() as other:
        alone = take_turns(one, lambda done: done < len(short))
        together = take_turns(many, lambda done: done < rounds)
    return {
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "batch_size": model.batch_size,
        "load": load_note(torch.get_num_threads(), other.cores),
        "latency_ms": _summarise_latency(alone),
        "throughput_texts_per_s": _summarise_throughput(together, len(long)),
    }


def wait_for(device: str) -> None:
    """Wait until a torch device has finished its work: calls of a GPU return earlier."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _check_speed_arguments(
    model: Embedder, baseline: Embedder, sentences: Sequence[str], rounds: int
) -> None:
    if not sentences:
        raise ValueError("no sentences to measure speed on. To fix, give at least one.")
    if rounds < 1:
        raise ValueError(f"rounds {rounds} measures nothing. To fix, use 1 or more.")
    for key in ("device", "batch_size"):
        values = [str(getattr(encoder, key)) for encoder in (model, baseline)]
        if values[0] != values[1]:
            raise ValueError(
                f"{key} of the model is {values[0]} and of the baseline {values[1]}: their speeds "
                "cannot be compared. To fix, load both in the same way."
            )


def _sample(sentences: Sequence[str], count: int) -> list[str]:
    """``count`` sentences at most, evenly spread, so that no part of a sorted list is left out."""
    if len(sentences) <= count:
        return list(sentences)
    return [sentences[index * len(sentences) // count] for index in range(count)]


def take_turns(
    jobs: Mapping[str, Callable[[int], T]], another: Callable[[int], bool]
) -> dict[str, list[T]]:
    """Run jobs interleaved, so that a busy machine slows all alike.

    Each is given the number of the round, in each of which another one goes first. ``another`` says
    whether to run another round, given how many are done. Results are in the order of the rounds.
    """
    results: dict[str, list[T]] = {name: [] for name in jobs}
    names, done = list(jobs), 0
    while another(done):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(jobs[name](done))
        done += 1
    return results


def timed(action: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of an action, until the device has done what it was given."""
    wait_for(device)
    started = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - started


def _summarise_latency(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    both = {name: np.array(values) for name, values in seconds.items()}
    result: dict[str, Any] = {}
    for name, values in both.items():
        median, p95 = (1e3 * float(np.percentile(values, percent)) for percent in (50, 95))
        result[name] = {"median": median, "p95": p95}
    result["ratio"] = result["model"]["median"] / result["baseline"]["median"]
    result["ratio_iqr"] = np.percentile(both["model"] / both["baseline"], [25, 75]).tolist()
    return result


def _summarise_throughput(seconds: Mapping[str, list[float]], texts: int) -> dict[str, Any]:
    rates = texts / np.array([seconds["model"], seconds["baseline"]])  # (2, rounds)
    model, baseline = np.median(rates, axis=1).tolist()
    quartiles = np.percentile(rates[0] / rates[1], [25, 75]).tolist()
    both = {"model": model, "baseline": baseline}
    return {**both, "ratio": model / baseline, "ratio_iqr": quartiles}


MEMORY = Path("/proc/meminfo")


class _LiveStorages(TorchDispatchMode):
    """Count the bytes of tensors made inside it that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # Views share the storage of an argument; weights were there before.
            if storage._cdata not in self.seen and storage._cdata not in inputs:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(values)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sparse = [part for t in tensors if t.is_sparse for part in (t._indices(), t._values())]
    return [tensor for tensor in tensors if not tensor.is_sparse] + sparse


def measure_peak_bytes(action: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes of tensors that were made by an action and alive together.

    Tensors that were there before, such as weights, are not counted. On a GPU what an operator uses
    inside and frees before it returns is counted, elsewhere it is not. Elsewhere no action may be
    compiled either: torch stops using the compiled form of what runs while it is watched.
    """
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    counter = _LiveStorages()
    with counter:
        action()
    return counter.peak


def free_bytes(device: str = "cpu") -> int:
    """Bytes that new tensors can take on a device without anything being swapped or killed.

    Anything but a GPU has the machine's memory.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    rows = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    return 1024 * int(rows["MemAvailable"].split()[0])
