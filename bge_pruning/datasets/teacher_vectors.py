"""The teacher's outputs of fixed texts, computed once and kept on disk as memory-mapped arrays.

A file is an ordinary ``.npy`` file with a seal behind the numbers, which NumPy does not look at:
the version of its meaning and a checksum. Without it, a block of zeros after a crash, or numbers
that an earlier version of this project wrote, would be trained on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts
from bge_pruning.utils.files import atomic_file, lock_of

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
    """Make arrays on disk to fill piece by piece, larger than memory if need be.

    Yields a function of name, shape and type that makes the array of a file, full of zeros and
    mapped into memory. When the block ends well, the files get their names; else none is left.
    """
    partial: dict[str, Path] = {}

    def allocate(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        array = np.lib.format.open_memmap(partial[name], "w+", dtype, shape)
        # A disk that is full says so here; to a write into the mapping it could not.
        if hasattr(os, "posix_fallocate"):  # Linux
            with partial[name].open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial[name].stat().st_size)
        return array

    with ExitStack() as files:
        for name, path in paths.items():
            # Where the disk has no locks, two machines may fill the same array.
            partial[name] = files.enter_context(atomic_file(path, unique=True))
        yield allocate
        for path in filter(Path.is_file, partial.values()):
            _seal(path)


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
        raise ValueError(f"it does not end with the mark of version {ARRAY_FORMAT}")
    if seal[len(SEAL) :] != compute_digest(path, size):
        raise ValueError("its checksum is not that of its content")


log = logging.getLogger(__name__)
Encode = Callable[[Tensor, Tensor], dict[str, Tensor]]
BATCH_TEXTS = 64
# Raised when the file's layout changes.
FORMAT = 3


def compute_cache_key(texts: TokenizedTexts, teacher_fingerprint: str) -> str:
    """Key of the vectors: the exact token ids and the exact teacher."""
    digest = hashlib.sha256(f"{FORMAT}:{teacher_fingerprint}".encode())
    for array in (texts.ids, texts.starts):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:24]


def cached_teacher_outputs(
    texts: TokenizedTexts, encode: Encode, pad_token_id: int, paths: Mapping[str, Path]
) -> dict[str, np.ndarray]:
    """Outputs of all texts, from the cache where it has them.

    Args:
        encode: The teacher: token ids and mask, shape ``(B, T)``, to outputs by name.
        paths: Cache file of each wanted output; its name must hold :func:`compute_cache_key`. A
            file is written as a whole or not at all, and by one process: others wait for it.

    Returns:
        Memory-mapped arrays by name, see :func:`encode_texts`.

    Raises:
        ValueError: If a cache file is damaged.
    """
    with ExitStack() as locks:
        for path in sorted(path for path in paths.values() if not path.is_file()):
            locks.enter_context(lock_of(path))
        missing = [name for name, path in paths.items() if not path.is_file()]
        if missing:
            log.info("embedding %d training texts with the teacher, once", len(texts))
            with new_arrays({name: paths[name] for name in missing}) as allocate:
                encode_texts(texts, encode, pad_token_id, missing, allocate)
    return {name: load_array(path) for name, path in paths.items()}


def _in_memory(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.zeros(shape, dtype)


def encode_texts(
    texts: TokenizedTexts,
    encode: Encode,
    pad_token_id: int,
    names: Sequence[str],
    allocate: Allocate = _in_memory,
) -> dict[str, np.ndarray]:
    """Outputs of all texts, encoded in batches of similar length.

    Args:
        encode: Token ids and mask, shape ``(B, T)``, to outputs by name: ``dense_vecs`` ``(B, H)``,
            ``token_weights`` ``(B, T)``, ``colbert_vecs`` ``(B, T - 1, C)`` without CLS.
        allocate: Makes the array of an output, full of zeros.

    Returns:
        In the order of the texts: ``dense_vecs`` ``(texts, H)`` in float32; of the others a row for
        every token of every text, laid out as ``texts.ids``: ``token_weights`` ``(tokens,)`` in
        float32, ``colbert_vecs`` ``(tokens, C)`` in float16, 0 for CLS.
    """
    order = np.argsort(texts.lengths, kind="stable")
    arrays: dict[str, np.ndarray] = {}
    starts = range(0, len(order), BATCH_TEXTS)
    # The bar is drawn only on a terminal.
    for start in tqdm(starts, desc="embedding", unit="batch", disable=None, leave=False):
        index = order[start : start + BATCH_TEXTS]
        ids, mask = pad_texts([texts[i] for i in index], pad_token_id)
        outputs = encode(ids, mask)
        for name in names:
            values = outputs[name].float().cpu().numpy()
            if name not in arrays:
                arrays[name] = allocate(name, *_layout(texts, name, values))
            _place(arrays[name], texts, index, name, values)
    return arrays


def _layout(texts: TokenizedTexts, name: str, values: np.ndarray) -> tuple[tuple[int, ...], type]:
    """Shape and type of the array of an output."""
    if name == "dense_vecs":
        return (len(texts), values.shape[1]), np.float32
    # Half precision halves the largest file by far; a cosine needs no more.
    dtype = np.float16 if name == "colbert_vecs" else np.float32
    return (len(texts.ids), *values.shape[2:]), dtype


def _place(
    array: np.ndarray, texts: TokenizedTexts, index: np.ndarray, name: str, values: np.ndarray
) -> None:
    if name == "dense_vecs":
        array[index] = values
        return
    first = 1 if name == "colbert_vecs" else 0  # without CLS
    for row, text in enumerate(index):
        start, end = texts.starts[text] + first, texts.starts[text + 1]
        array[start:end] = values[row, : end - start]
