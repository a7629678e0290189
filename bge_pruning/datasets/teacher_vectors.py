"""The teacher's vectors of fixed texts, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts

log = logging.getLogger(__name__)

BATCH_TEXTS = 64
# Raised when the file's layout changes.
FORMAT = 1


def compute_cache_key(texts: TokenizedTexts, teacher_fingerprint: str) -> str:
    """Key of the vectors: the exact token ids and the exact teacher."""
    digest = hashlib.sha256(f"{FORMAT}:{teacher_fingerprint}".encode())
    digest.update(texts.ids.tobytes())
    digest.update(texts.starts.tobytes())
    return digest.hexdigest()[:24]


def cached_teacher_vectors(
    texts: TokenizedTexts,
    encode: Callable[[Tensor, Tensor], Tensor],
    pad_token_id: int,
    path: Path,
) -> np.ndarray:
    """Vectors of all texts, from the cache if it has them.

    Args:
        texts: The texts.
        encode: The teacher: token ids and mask, shape ``(B, T)``, to vectors ``(B, H)``.
        pad_token_id: Id to pad with.
        path: Cache file; its name must hold :func:`compute_cache_key`. It is written as a whole
            or not at all.

    Returns:
        Memory-mapped array, shape ``(texts, H)``, float32.

    Raises:
        ValueError: If the cache file is damaged.
    """
    if not path.is_file():
        log.info("embedding %d training texts with the teacher, once", len(texts))
        vectors = encode_texts(texts, encode, pad_token_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}.npy")
        try:
            np.save(partial, vectors)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: damaged or not complete ({error}). To fix, delete it; it is made again."
        ) from error


def encode_texts(
    texts: TokenizedTexts, encode: Callable[[Tensor, Tensor], Tensor], pad_token_id: int
) -> np.ndarray:
    """Vectors of all texts, encoded in batches of similar length.

    Args:
        texts: The texts.
        encode: Token ids and mask, shape ``(B, T)``, to vectors ``(B, H)``.
        pad_token_id: Id to pad with.

    Returns:
        Shape ``(texts, H)``, float32, in the order of the texts.
    """
    order = np.argsort(texts.lengths, kind="stable")
    vectors = None
    for start in range(0, len(order), BATCH_TEXTS):
        index = order[start : start + BATCH_TEXTS]
        ids, mask = pad_texts([texts[i] for i in index], pad_token_id)
        batch = encode(ids, mask).float().cpu().numpy()
        if vectors is None:
            vectors = np.empty((len(order), batch.shape[1]), dtype=np.float32)
        vectors[index] = batch
    return vectors
