"""Arrays kept on disk: each file is written as a whole or not at all, and mapped into memory."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Allocate = Callable[[str, tuple[int, ...], type], np.ndarray]


@contextmanager
def new_arrays(paths: Mapping[str, Path]) -> Iterator[Allocate]:
    """Files to fill piece by piece, larger than memory if need be.

    Args:
        paths: The file of each name.

    Yields:
        A function of name, shape and type that makes the array of a file, full of zeros and mapped
        into memory. When the block ends well, the files get their names; else none is left.
    """
    partial = {name: _partial(path) for name, path in paths.items()}

    def allocate(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        partial[name].parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(partial[name], "w+", dtype, shape)
        # A disk that is full says so here; to a write into the mapping it could not.
        if hasattr(os, "posix_fallocate"):  # Linux
            with partial[name].open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial[name].stat().st_size)
        return array

    try:
        yield allocate
        for name, path in paths.items():
            if partial[name].is_file():
                partial[name].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    # Not the number of the process: two machines may share both the disk and the number.
    return path.with_suffix(f".partial-{uuid.uuid4().hex[:8]}.npy")


def save_array(array: np.ndarray, path: Path) -> None:
    """Write a ``.npy`` file, and its folder if it is missing.

    Args:
        array: The array.
        path: The file; one that is there is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        np.save(partial, array)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file into memory.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or not complete ({error}). To fix, delete it; it is made again."
        ) from error
