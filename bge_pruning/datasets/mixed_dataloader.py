"""Which source each batch comes from, and which examples of similar length it holds.

Every batch holds examples of one source, since their losses differ and so do their negatives. Batch
``k`` of a run follows from the seed and the weights alone: a run that resumes at step ``k``
computes it, and replays nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

# Batches that are sorted together: more means less padding and less random batches.
BATCHES_PER_GROUP = 16


def group_batches(
    lengths: np.ndarray, batch_size: int, seed: tuple[int, ...], grouped: bool = True
) -> np.ndarray:
    """The batches of one epoch, example indices of shape ``(n // batch_size, batch_size)``.

    The examples are shuffled; if ``grouped``, groups of ``BATCHES_PER_GROUP`` batches are sorted by
    length and cut into batches, and the batches are shuffled. Examples that do not fill the last
    batch wait for another epoch. Each seed, of the run, the epoch and so on, gives another order.
    """
    generator = np.random.default_rng(seed)
    batches = len(lengths) // batch_size
    order = generator.permutation(len(lengths))[: batches * batch_size]
    group = BATCHES_PER_GROUP * batch_size
    for start in range(0, len(order) if grouped else 0, group):
        part = order[start : start + group]
        order[start : start + group] = part[np.argsort(lengths[part], kind="stable")]
    return generator.permutation(order.reshape(batches, batch_size))


def padding_share(
    lengths: np.ndarray, tokens: np.ndarray, width: int, batches: np.ndarray
) -> float:
    """Share of padding if every text of a batch is padded to the longest of all.

    Per example there are the tokens of the longest text and of all texts, each ``(n,)``, and
    ``width`` texts.
    """
    padded = lengths[batches].max(axis=1).sum() * batches.shape[1] * width
    return 1.0 - float(tokens[batches].sum() / padded)


class MixSchedule:
    """Which source each batch comes from, in the proportion of the weights.

    Every batch gives each source its weight as credit; the source with the most is drawn and pays
    1. After ``k`` batches a source of weight ``w`` was drawn ``k w`` times, to within the number of
    sources, and never in a lump.

    Args:
        later: Weights from a batch on, which are known from the beginning: ``(batch, weights)``. As
            soon as there are any, a weight may be 0, and each part of the run counts for itself.
    """

    def __init__(
        self, weights: Sequence[float], later: Sequence[tuple[int, Sequence[float]]] = ()
    ) -> None:
        parts = [(0, weights), *later]
        # (first batch, weights from there on), so that every earlier batch can be told again.
        self.updates = [(first, _normalised(values, bool(later))) for first, values in parts]
        self.planned = [first for first, _ in later]
        self._rewind()

    def _rewind(self) -> None:
        self.step = 0
        self._credit = np.zeros(len(self.updates[0][1]))
        self.drawn = np.zeros(len(self._credit), np.int64)  # batches of each source so far

    def weights(self) -> np.ndarray:
        """Weights of the next batch."""
        return max((u for u in self.updates if u[0] <= self.step), key=lambda u: u[0])[1]

    def shares(self, end: int) -> np.ndarray:
        """Share of each source of the batches up to ``end``."""
        firsts, weights = zip(*self.updates, strict=True)
        return np.average(weights, axis=0, weights=np.diff([*firsts, end]))

    def update(self, weights: Sequence[float]) -> None:
        """Other weights from the next batch on."""
        self.updates = [u for u in self.updates if u[0] != self.step]
        self.updates.append((self.step, _normalised(weights)))

    def draw(self) -> tuple[int, int]:
        """Source of the next batch, and how many batches of that source were drawn before."""
        if self.step in self.planned:
            self._credit[:] = 0.0  # what an earlier part left over is no reason to draw a source
        self._credit += self.weights()
        source = int(self._credit.argmax())
        self._credit[source] -= 1.0
        number = int(self.drawn[source])
        self.drawn[source] += 1
        self.step += 1
        return source, number

    def seek(self, step: int) -> None:
        """Make ``step`` the next batch."""
        if step < self.step:
            self._rewind()
        while self.step < step:
            self.draw()

    def state_dict(self) -> dict[str, Any]:
        """The weights so far, and those that were planned."""
        updates = [(step, weights.tolist()) for step, weights in self.updates]
        return {"updates": updates, "planned": self.planned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights of the run that is resumed; what is planned may change later on.

        Raises:
            ValueError: If a part of the run that has begun was planned otherwise.
        """
        saved = [(step, np.array(weights)) for step, weights in state["updates"]]
        if self.planned or state.get("planned"):
            end = max(1, state["batch"])
            before, now = (
                [(step, weights.tolist()) for step, weights in updates if step < end]
                for updates in (saved, self.updates)
            )
            if before != now:
                raise ValueError(
                    f"the checkpoint was trained with weights of the sources by step {before}, the "
                    f"configuration gives {now}. To fix, resume with the same data.stages, or "
                    f"start a new run."
                )
        else:
            self.updates = saved
        self._rewind()


def adapt_weights(
    weights: Sequence[float], losses: Sequence[float], references: Sequence[float]
) -> np.ndarray:
    """Weights that favour the sources that pruning has hurt most (arXiv:2310.06694, Algorithm 1).

    ``w_i exp(max(loss_i - reference_i, 0))``, scaled to the sum 1.
    """
    excess = np.maximum(np.subtract(losses, references, dtype=np.float64), 0.0)
    # The largest is taken off first: exp of a large excess is infinite, and the scale is free.
    return _normalised(np.asarray(weights) * np.exp(excess - excess.max()))


def _normalised(weights: Sequence[float], some: bool = False) -> np.ndarray:
    """The weights with the sum 1; if ``some`` are enough, others may be 0."""
    values = np.asarray(weights, np.float64)
    above = (values > 0).any() and (values >= 0).all() if some else (values > 0).all()
    if not (np.isfinite(values).all() and above):
        raise ValueError(
            f"weights {values.tolist()} of the sources are not all above 0. To fix, set weight "
            f"above 0, or remove the source."
        )
    values = values / values.max()  # their sum may be more than a float holds
    return values / values.sum()


class MixedDataset(Dataset):
    """The datasets of several sources, under indices ``(source, index)``.

    It knows its schedule so that a trainer that asks a dataset for its state finds it here.
    """

    def __init__(
        self,
        names: Sequence[str],
        datasets: Sequence[Dataset],
        schedule: MixSchedule,
        batch_size: int,
    ) -> None:
        self.names = list(names)
        self.datasets = list(datasets)
        self.schedule = schedule
        self.batch_size = batch_size
        # Batches of the run before this epoch, and those that a checkpoint has behind it.
        self.epoch_start = 0
        self.resume_at = 0
        # Called where weights change, before batches from one number up to another are drawn.
        self.prepare: Callable[[int, int], None] | None = None

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, object]:
        """An example, with the name of its source."""
        source, example = index
        return {**self.datasets[source][example], "source": self.names[source]}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint needs of the data: the trainer's own interface to datasets."""
        batch = self.epoch_start + num_samples // self.batch_size
        return {"names": self.names, "batch": batch, **self._sizes(), **self.schedule.state_dict()}

    def _sizes(self) -> dict[str, Any]:
        """What the place of a batch in an epoch depends on."""
        rows = [len(dataset) for dataset in self.datasets]
        return {"rows": rows, "batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where a checkpoint stopped."""
        if list(state["names"]) != self.names:
            raise ValueError(
                f"the checkpoint was trained on {', '.join(state['names'])}, the configuration "
                f"names {', '.join(self.names)}. To fix, resume with the same data.train, or start "
                f"a new run."
            )
        for key, value in self._sizes().items():
            if state.get(key, value) != value:
                raise ValueError(
                    f"the checkpoint was trained with {key} {state[key]}, the configuration gives "
                    f"{value}. To fix, resume with the same data and batch size, or start a new "
                    f"run."
                )
        self.schedule.load_state_dict(state)
        self.resume_at = state["batch"]


class BatchSize(NamedTuple):
    """Real tokens that are computed at once, texts of an example, tokens of the longest text."""

    tokens: int
    width: int
    length: int


class MixedBatchSampler(DistributedSampler):
    """Yields a rank's share of every batch, as lists of ``(source, index)``.

    An epoch is as many batches as all sources hold together. Each source goes through its examples
    in epochs of its own, in another order each time; the index of an example is
    ``epoch * len(source) + example``. Batch ``k`` holds the same examples for any number of ranks.

    Raises:
        ValueError: If the batch does not divide over the ranks or is larger than a source.
    """

    def __init__(
        self,
        dataset: MixedDataset,
        lengths: Sequence[np.ndarray],
        num_replicas: int,
        rank: int,
        seed: int,
        grouped: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        size = dataset.batch_size
        if size % num_replicas:
            raise ValueError(
                f"global_train_batch_size {size} does not divide over {num_replicas} "
                f"processes. To fix, make it a multiple of {num_replicas}."
            )
        for name, values in zip(dataset.names, lengths, strict=True):
            if size > len(values):
                raise ValueError(
                    f"global_train_batch_size {size} is larger than the training data, "
                    f"{len(values)} examples of {name}. To fix, lower it, add data, or make "
                    f"several files one source (path: folder/*.csv)."
                )
        self.lengths = list(lengths)
        self.grouped = grouped
        self.batches = [len(values) // size for values in lengths]
        # The batches of the epoch that each source is in.
        self._current: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return sum(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The rest of the current epoch."""
        data, schedule = self.dataset, self.dataset.schedule
        data.epoch_start = self.epoch * len(self)
        # A checkpoint of the end of an epoch may leave nothing of it, or begin the next.
        first, end = max(data.epoch_start, data.resume_at), data.epoch_start + len(self)
        schedule.seek(first)
        for _ in range(first, end):
            source, number = schedule.draw()
            epoch, batch = divmod(number, self.batches[source])
            rows = self.rows_of(source, epoch)[batch]
            offset = epoch * len(self.lengths[source])
            yield [(source, offset + row) for row in rows.tolist()]

    def rows_of(self, source: int, epoch: int) -> np.ndarray:
        """This rank's examples of every batch of an epoch of a source."""
        return self._batches_of(source, epoch)[:, self.rank :: self.num_replicas]

    def drawn(self, first: int, end: int) -> list[np.ndarray]:
        """Examples of each source in batches ``first`` up to ``end`` of the run, on all ranks.

        They are told by the weights that are known now.
        """
        schedule = copy.deepcopy(self.dataset.schedule)
        schedule.seek(first)
        before = schedule.drawn.copy()
        schedule.seek(end)
        bounds = enumerate(zip(before.tolist(), schedule.drawn.tolist(), strict=True))
        return [self.examples_of(source, *numbers) for source, numbers in bounds]

    def examples_of(self, source: int, first: int, end: int) -> np.ndarray:
        """Examples of some batches of a source, which are counted over its epochs, on all ranks."""
        count, size = self.batches[source], len(self.lengths[source])
        parts = [np.zeros(0, np.int64)]
        for epoch in range(first // count, -(-end // count)):
            start = epoch * count
            rows = self._batches_of(source, epoch)[max(first - start, 0) : end - start]
            parts.append(rows.ravel() + epoch * size)
        return np.concatenate(parts)

    def widest_batch(self, rows_at_once: int | None) -> BatchSize:
        """The largest batch of this rank in the first epoch of all sources.

        It is the one with most tokens at once: of all examples if ``rows_at_once`` is ``None``.
        """
        widest = BatchSize(0, 0, 0)
        for source, data in enumerate(self.dataset.datasets):
            rows = self.rows_of(source, epoch=0)  # (batches, examples)
            starts = range(0, rows.shape[1], rows_at_once or rows.shape[1])
            tokens = np.add.reduceat(data.tokens[rows], starts, axis=1).max(1)
            batch = int(tokens.argmax())
            longest = int(self.lengths[source][rows[batch]].max())
            widest = max(widest, BatchSize(int(tokens[batch]), data.width, longest))
        return widest

    def _batches_of(self, source: int, epoch: int) -> np.ndarray:
        if self._current.get(source, (None,))[0] != epoch:
            # The first source's order is that of a run on it alone.
            seed = (self.seed, epoch, source)
            lengths, size = self.lengths[source], self.dataset.batch_size
            self._current[source] = (epoch, group_batches(lengths, size, seed, self.grouped))
        return self._current[source][1]


# Tokens of a batch, padding included: long texts come in smaller batches.
BATCH_TOKENS = 16_384


def batch_indices(lengths: np.ndarray, texts: int, tokens: int) -> Iterator[np.ndarray]:
    """Batches of texts of similar length, longest first: what does not fit fails at once.

    A batch has at most ``texts`` texts and ``tokens`` tokens, padding included; a longer text has a
    batch of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, min(texts, tokens // max(1, int(lengths[order[start]]))))
        yield order[start : start + size]
        start += size
