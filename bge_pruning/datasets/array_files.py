"""Arrays kept on disk: each file is written as a whole or not at all, and mapped into memory.

A file is an ordinary ``.npy`` file with a seal behind the numbers, which NumPy does not look at:
the version of its meaning and a checksum. Without it, a block of zeros after a crash, or numbers
that an earlier version of this project wrote, would be trained on.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Allocate = Callable[[str, tuple[int, ...], type], np.ndarray]
# Raised when what the numbers mean changes.
ARRAY_FORMAT = 1
SEAL = f"\nbge_pruning array {ARRAY_FORMAT} ".encode()
DIGEST_BYTES = 16
# A checksum covers as many blocks, evenly spread: all of a file up to 1 GiB. The vectors of every
# token may be hundreds, which nobody would wait for at every start.
BLOCK = 1 << 20
BLOCKS = 1024


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
                _seal(partial[name])
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
        _seal(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file into memory.

    Args:
        path: The file, written by :func:`new_arrays` or :func:`save_array`.

    Raises:
        ValueError: If the file is damaged, or another version wrote it.
    """
    try:
        _check_seal(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or not complete ({error}). To fix, delete it; it is made again."
        ) from error


def compute_digest(path: Path, size: int) -> bytes:
    """Checksum of the first bytes of a file; of a large one, of blocks spread over it.

    Args:
        path: The file.
        size: How many bytes.
    """
    count = -(-size // BLOCK)
    chosen = range(count)
    if count > BLOCKS:
        chosen = [block * (count - 1) // (BLOCKS - 1) for block in range(BLOCKS)]
    digest = hashlib.blake2b(str(size).encode(), digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        for block in chosen:
            file.seek(block * BLOCK)
            digest.update(file.read(min(BLOCK, size - block * BLOCK)))
    return digest.digest()


def _seal(path: Path) -> None:
    digest = compute_digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(SEAL + digest)


def _check_seal(path: Path) -> None:
    size = path.stat().st_size - len(SEAL) - DIGEST_BYTES
    if size < 0:
        raise ValueError("it is too short")
    with path.open("rb") as file:
        file.seek(size)
        seal = file.read()
    if not seal.startswith(SEAL):
        raise ValueError(f"it does not end with the mark of version {ARRAY_FORMAT}")
    if seal[len(SEAL) :] != compute_digest(path, size):
        raise ValueError("its checksum is not that of its content")
