"""The batches that the benchmark trains on, made in every step as a training makes them.

A training with ``data.num_workers`` 0, the default, reads the rows of a batch, pads them and moves
them to the device between two steps; here that is part of the step, and timed apart as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bge_pruning.datasets.array_files import load_array, save_array
from bge_pruning.datasets.embedding_dataset import Collator, EmbeddingDataset, TokenizedTexts
from bge_pruning.datasets.length_groups import group_batches
from bge_pruning.models.device_copy import to_device

# How texts are put together: cut to one length; padded to the longest of a random batch; grouped.
FIXED, RANDOM, GROUPED = "fixed length", "random batches", "length groups"

# ``input_ids``, ``attention_mask`` (B, 1, T), ``teacher_dense_vecs`` (B, 1, H); ``lengths``.
Batch = dict[str, "Tensor | list[list[int]]"]


@dataclass(frozen=True)
class TextBatches:
    """Batches of one kind.

    Attributes:
        rows: Texts of every batch, shape ``(steps, B)``.
        plain: The texts alone.
        cached: The texts with the teacher's vectors as ``data_builders`` gives them to a training
            with ``teacher.cache``: the mapped ``.npy`` file that holds them all. The system has the
            file in memory, as it has where the cache fits; a cache larger than that is not
            measured.
        targets: The same vectors of every batch on the device, each ``(B, 1, H)``.
        pad_token_id: Id of the padding token.
        device: Torch device.
    """

    rows: np.ndarray
    plain: EmbeddingDataset
    cached: EmbeddingDataset
    targets: list[Tensor]
    pad_token_id: int
    device: str

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, index: int, cached: bool) -> Batch:
        """A batch on the device.

        The two ways differ in the teacher's vectors alone: found in the file, copied by the
        collator and moved; or there already.

        Args:
            index: Its number.
            cached: Read the teacher's vectors from the file.
        """
        dataset = self.cached if cached else self.plain
        batch = Collator(self.pad_token_id)([dataset[row] for row in self.rows[index].tolist()])
        moved = {name: _move(value, self.device) for name, value in batch.items()}
        return moved if cached else {**moved, "teacher_dense_vecs": self.targets[index]}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every text of every batch, shape ``(steps, B)``."""
        return self.plain.lengths[self.rows]

    @property
    def padded(self) -> np.ndarray:
        """Tokens of every batch, padding included, shape ``(steps,)``."""
        return self.lengths.max(axis=1) * self.rows.shape[1]

    @property
    def widest(self) -> int:
        """Number of the batch with most tokens, padding included."""
        return int(self.padded.argmax())

    @property
    def narrowest(self) -> int:
        """Number of the batch with fewest tokens, padding included."""
        return int(self.padded.argmin())


def make_batches(
    texts: TokenizedTexts,
    batch_size: int,
    length: int,
    steps: int,
    pad_token_id: int,
    hidden: int,
    folder: Path,
    device: str = "cpu",
) -> dict[str, TextBatches]:
    """Batches by kind; the random and the grouped ones are made of the same texts.

    Args:
        texts: Texts of mixed lengths.
        batch_size: Texts of a batch.
        length: Tokens of a text of fixed length.
        steps: Batches of each kind.
        pad_token_id: Id of the padding token.
        hidden: ``H``, for the teacher's vectors, which are random.
        folder: Where the files of the teacher's vectors are written.
        device: Torch device.

    Raises:
        ValueError: If there are too few texts.
    """
    count = batch_size * steps
    if len(texts) < count:
        raise ValueError(
            f"{len(texts)} texts are too few for {steps} batches of {batch_size}. To fix, give "
            f"more texts, or lower --steps or --batch-size."
        )
    kinds = {
        FIXED: (_cut(texts, count, length, pad_token_id), np.arange(count).reshape(steps, -1)),
        **{
            kind: (
                texts,
                group_batches(texts.lengths[:count], batch_size, (0,), grouped=kind == GROUPED),
            )
            for kind in (RANDOM, GROUPED)
        },
    }
    made = {}
    for number, (kind, (kept, rows)) in enumerate(kinds.items()):
        vectors = _write_vectors(folder / f"teacher-{number}.npy", len(kept), hidden)
        examples = np.arange(len(kept))[:, None]
        made[kind] = TextBatches(
            rows=rows,
            plain=EmbeddingDataset(kept, examples),
            cached=EmbeddingDataset(kept, examples, teacher={"dense_vecs": vectors}),
            targets=[_move(torch.from_numpy(vectors[row][:, None]), device) for row in rows],
            pad_token_id=pad_token_id,
            device=device,
        )
    return made


def _cut(texts: TokenizedTexts, count: int, length: int, pad_token_id: int) -> TokenizedTexts:
    """As many texts of one length, of the same tokens."""
    real = texts.ids[texts.ids != pad_token_id]
    return TokenizedTexts(np.resize(real, count * length), length * np.arange(count + 1), 0)


def _write_vectors(path: Path, count: int, hidden: int) -> np.ndarray:
    """Random unit vectors, shape ``(count, H)``, mapped from a file."""
    generator = torch.Generator().manual_seed(0)
    save_array(F.normalize(torch.randn(count, hidden, generator=generator), dim=-1).numpy(), path)
    return load_array(path)


def _move(value: Tensor | list[list[int]], device: str) -> Tensor | list[list[int]]:
    """On the device; to a GPU from pinned memory and without waiting, as the trainer does it."""
    return to_device(value, torch.device(device)) if isinstance(value, Tensor) else value
