"""Memory that tensors take while something runs, on any device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MEMORY = Path("/proc/meminfo")


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are still alive."""

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
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def measure_peak_bytes(action: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes of tensors that were made by an action and alive together.

    Tensors that were there before, such as weights, are not counted. On a GPU what an operator uses
    inside and frees before it returns is counted, elsewhere it is not.

    Args:
        action: What to run; it runs once. Not compiled, but on a GPU: torch stops using the
            compiled form of what runs while its tensors are watched.
        device: Where the action makes its tensors.
    """
    if torch.device(device).type == "cuda":
        return _measure_peak_of_gpu(action, device)
    counter = _LiveStorages()
    with counter:
        action()
    return counter.peak


def _measure_peak_of_gpu(action: Callable[[], object], device: str) -> int:
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: str = "cpu") -> int:
    """Bytes that new tensors can take on a device without anything being swapped or killed.

    Args:
        device: Torch device; anything but a GPU is the machine's memory.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    rows = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    return 1024 * int(rows["MemAvailable"].split()[0])
