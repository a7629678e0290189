"""Arrays as ``.npy`` files with a seal behind the numbers, which NumPy does not look at.

It is the version of their meaning and a checksum.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from bge_pruning.utils.files import atomic_file

# Raised when what the numbers mean changes.
FORMAT = 1
SEAL = f"\nbge_pruning array {FORMAT} ".encode()
DIGEST_BYTES = 16
# A checksum covers as many blocks, evenly spread: all of a file up to 1 GiB. The vectors of every
# token may be hundreds, which nobody would wait for at every start.
BLOCK = 1 << 20
BLOCKS = 1024


def save_array(array: np.ndarray, path: Path) -> None:
    """Write a ``.npy`` file, and its folder if it is missing."""
    with atomic_file(path, unique=True) as partial:
        np.save(partial, array)
        _seal(partial)


def load_array(path: Path) -> np.ndarray:
    """Map a ``.npy`` file into memory, if it is sealed and whole."""
    try:
        _check_seal(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or not complete ({error}). To fix, delete it; it is made again."
        ) from error


def compute_digest(path: Path, size: int) -> bytes:
    """Checksum of the first bytes of a file; of a large one, of blocks spread over it."""
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
        raise ValueError(f"it does not end with the mark of version {FORMAT}")
    if seal[len(SEAL) :] != compute_digest(path, size):
        raise ValueError("its checksum is not that of its content")
