"""The teacher's outputs of fixed texts, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bge_pruning.datasets.array_files import Allocate, load_array, new_arrays
from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts
from bge_pruning.utils.file_lock import lock_of

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
    """Outputs of all texts, from the cache as far as it has them.

    Args:
        texts: The texts.
        encode: The teacher: token ids and mask, shape ``(B, T)``, to outputs by name.
        pad_token_id: Id to pad with.
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
        texts: The texts.
        encode: Token ids and mask, shape ``(B, T)``, to outputs by name: ``dense_vecs`` ``(B, H)``,
            ``token_weights`` ``(B, T)``, ``colbert_vecs`` ``(B, T - 1, C)`` without CLS.
        pad_token_id: Id to pad with.
        names: Outputs to keep.
        allocate: Makes the array of an output, full of zeros.

    Returns:
        In the order of the texts: ``dense_vecs`` ``(texts, H)`` in float32; of the others a row for
        every token of every text, laid out as ``texts.ids``: ``token_weights`` ``(tokens,)`` in
        float32, ``colbert_vecs`` ``(tokens, C)`` in float16, 0 for CLS.
    """
    order = np.argsort(texts.lengths, kind="stable")
    arrays: dict[str, np.ndarray] = {}
    starts = range(0, len(order), BATCH_TEXTS)
    # Nothing is drawn where there is no terminal.
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
