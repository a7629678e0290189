"""Random batches of texts of similar length, the same whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

# Batches that are sorted together: more means less padding and less random batches.
BATCHES_PER_GROUP = 16


class LengthGroupedSampler(DistributedSampler):
    """Yields a rank's share of global batches that hold texts of similar length.

    The examples are shuffled, groups of ``BATCHES_PER_GROUP`` batches are sorted by length and cut
    into batches, and the batches are shuffled. Batch ``k`` holds the same examples for any number
    of ranks. Examples that do not fill the last batch wait for another epoch.

    Args:
        dataset: Only its length is used.
        lengths: Tokens of each example, shape ``(n,)``.
        global_batch_size: Examples per step over all ranks, a multiple of ``num_replicas``.
        num_replicas: Ranks.
        rank: This rank.
        seed: Seed; each epoch has its own order.
        epoch_in_index: Yield ``epoch * len(dataset) + example``, for a dataset that draws other
            examples in every epoch.

    Raises:
        ValueError: If the batch does not divide over the ranks or is larger than the dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        lengths: np.ndarray,
        global_batch_size: int,
        num_replicas: int,
        rank: int,
        seed: int,
        epoch_in_index: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        if global_batch_size % num_replicas:
            raise ValueError(
                f"global_train_batch_size {global_batch_size} does not divide over {num_replicas} "
                f"processes. To fix, make it a multiple of {num_replicas}."
            )
        if global_batch_size > len(lengths):
            raise ValueError(
                f"global_train_batch_size {global_batch_size} is larger than the training data, "
                f"{len(lengths)} examples. To fix, lower it or add data."
            )
        self.epoch_in_index = epoch_in_index
        self.lengths = np.asarray(lengths)
        self.global_batch_size = global_batch_size
        self.batches = len(self.lengths) // global_batch_size
        self.num_samples = self.batches * (global_batch_size // num_replicas)
        self.total_size = self.num_samples * num_replicas

    def __iter__(self) -> Iterator[int]:
        """This rank's example indices of the current epoch."""
        own = self._global_batches()[:, self.rank :: self.num_replicas].ravel()
        if self.epoch_in_index:
            own = own + self.epoch * len(self.lengths)
        return iter(own.tolist())

    def _global_batches(self) -> np.ndarray:
        """Example indices of all ranks, shape ``(batches, global_batch_size)``."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))[: self.batches * self.global_batch_size]
        group = BATCHES_PER_GROUP * self.global_batch_size
        for start in range(0, len(order), group):
            part = order[start : start + group]
            order[start : start + group] = part[np.argsort(self.lengths[part], kind="stable")]
        return generator.permutation(order.reshape(self.batches, self.global_batch_size))
