"""Keep the teacher's outputs of the texts that a run will draw, if that is worth it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from composer.utils import dist
from torch import Tensor

from bge_pruning.callbacks.progress_log import render_time
from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.datasets.mixed_dataloader import MixedBatchSampler
from bge_pruning.datasets.teacher_vectors import (
    TeacherCache,
    compute_cache_bytes,
    compute_cache_key,
    text_lengths,
)
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.model_io.teacher_folder import Teacher
from bge_pruning.models.teacher import HIDDEN, LAST
from bge_pruning.reports.report_tables import render_bytes
from bge_pruning.training.rank_watch import ask_rank_zero, rank_zero_first
from bge_pruning.utils.environment import torch_device

log = logging.getLogger(__name__)

# A cache that saves a smaller share of the teacher's work is not worth its room on the disk.
LEAST_SAVING = 0.2
# Share of the free disk that a cache may fill unasked: checkpoints need room too.
DISK_SHARE = 0.5
LOG_SECONDS = 30.0


def open_cache(
    config: Config, teacher: Teacher, texts: TokenizedTexts, names: Sequence[str]
) -> TeacherCache:
    """Open the cache of the texts of a source."""
    key = compute_cache_key(texts, teacher.fingerprint())
    return TeacherCache(texts, Path(config.data.processed_folder) / f"teacher-{key}", names)


def fill_caches(
    caches: Sequence[TeacherCache],
    texts: Sequence[np.ndarray],
    config: Config,
    base: BaseModel,
    teacher: Teacher,
) -> None:
    """Embed the texts of each cache that it lacks, and log how long it will take."""
    pairs, device = list(zip(caches, texts, strict=True)), torch_device(config.device)
    who = "encoder" if config.model.freeze_encoder else "teacher"
    progress = Progress(sum(cache.missing_tokens(numbers) for cache, numbers in pairs), who)

    def encode(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return teacher.encoder()(ids.to(device), mask.to(device))

    for cache, numbers in pairs:
        cache.fill(numbers, encode, base.hf_config["pad_token_id"], progress.add)


class Progress:
    """Logs how many of all tokens the teacher has embedded, and the time left."""

    def __init__(self, total: int, who: str = "teacher") -> None:
        self.total, self.done, self.who = total, 0, who
        self.begun = time.monotonic()
        self.told = self.begun - LOG_SECONDS / 2

    def add(self, tokens: int) -> None:
        """Count the tokens of a batch."""
        self.done += tokens
        now = time.monotonic()
        if now - self.told < LOG_SECONDS and self.done < self.total:
            return
        self.told = now
        left = render_time((now - self.begun) * max(self.total - self.done, 0) / self.done)
        counts = f"{self.done:,}", f"{self.total:,}"
        log.info("%s: %s of %s tokens embedded, left %s", self.who, *counts, left)


@dataclass(frozen=True)
class CacheCost:
    """What a cache costs and saves.

    Attributes:
        drawn: Tokens that the teacher embeds in all steps of the run without a cache.
        missing: Tokens that it embeds to make the cache.
        texts: How many different texts are drawn.
        size: Bytes that the cache has yet to write.
        free: Bytes that may be written to the disk.
        ranks: Processes that share the steps, while one of them makes the cache.
    """

    drawn: int
    missing: int
    texts: int
    size: int
    free: int
    ranks: int

    def choose(self) -> tuple[bool, str]:
        """Choose whether to keep outputs, and say why."""
        if not self.missing:
            return True, "they are there already"
        if self.size > DISK_SHARE * self.free:
            size, free = render_bytes(self.size), render_bytes(self.free)
            return False, f"they would take {size} of {free} free to write"
        repeats = self.drawn / self.missing
        shared = f", shared by {self.ranks} processes" if self.ranks > 1 else ""
        why = f"the steps would embed {repeats:.1f} times the tokens of a cache{shared}"
        return self.missing * self.ranks <= (1.0 - LEAST_SAVING) * self.drawn, why


class TeacherTargets:
    """The teacher's outputs of the texts of a run: on disk, or computed in the steps.

    Args:
        names: Outputs that the loss needs.
        sampler: Tells which examples the run draws.
    """

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        teacher: Teacher,
        names: Sequence[str],
        sampler: MixedBatchSampler,
    ) -> None:
        self.config, self.base, self.teacher = config, base, teacher
        self.names = tuple(names)
        self.sampler = sampler
        self.caches: list[TeacherCache] = []

    def decide(self) -> bool:
        """Choose whether the outputs are kept on disk, and check that they have room there.

        Raises:
            ConfigError: If ``teacher.cache`` is true and there is no room.
        """
        asked = self.config.teacher.cache
        if asked is False:
            return False
        if HIDDEN in self.names:  # which is refused where a cache is asked for
            log.info("teacher.cache=auto: in every step, hidden states are too many to keep")
            return False
        datasets = self.sampler.dataset.datasets
        with rank_zero_first():
            self.caches = [
                open_cache(self.config, self.teacher, data.texts, self.names) for data in datasets
            ]
        # The disks of several machines differ, and the ranks must not.
        keep = ask_rank_zero(lambda: self._ask(asked is True))
        if keep and self.config.data.adapt_weights_interval is not None:
            self._prepare_probes()
        return keep

    def _ask(self, asked: bool) -> bool:
        cost = self.estimate(0, self._count_batches(self.config.max_duration))
        folder = self.config.data.processed_folder
        size, free = render_bytes(cost.size), render_bytes(cost.free)
        if asked and cost.size > cost.free:
            raise ConfigError(
                f"teacher.cache=true needs {size} in data.processed_folder {folder}, which has "
                f"{free} free to write. To fix, free some, name another folder, or set "
                f"teacher.cache=false."
            )
        chosen, why = cost.choose()
        written = f"{size} to write to {folder}, {free} free"
        where = f"{cost.texts:,} texts on disk{f' ({written})' if cost.missing else ''}"
        log.info(
            "%s: %s; teacher.cache=%s",
            "states of the encoder" if LAST in self.names else "teacher's outputs",
            where if asked or chosen else "computed in every step",
            "true" if asked else f"auto, {why}",
        )
        if (asked or chosen) and cost.missing:
            self.teacher.encoder()  # if it cannot be read, that is said before the run has a folder
        return asked or chosen

    def estimate(self, first: int, end: int) -> CacheCost:
        """What it costs to keep the outputs of batches ``first`` up to ``end`` of the run."""
        drawn = missing = texts = size = 0
        widths = (self.teacher.hidden_size(), self.teacher.colbert_dim())
        for cache, (numbers, counts) in zip(self.caches, self._draws(first, end), strict=True):
            drawn += int((text_lengths(cache.texts, numbers) * counts).sum())
            texts += len(numbers)
            tokens = cache.missing_tokens(numbers)
            missing += tokens
            size += compute_cache_bytes(len(cache.missing(numbers)), tokens, self.names, *widths)
        folder = Path(self.config.data.processed_folder).absolute()
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free if os.access(there, os.W_OK) else 0
        return CacheCost(drawn, missing, texts, size, free, dist.get_world_size())

    def _draws(self, first: int, end: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The different texts of each source in some batches, and how often each is drawn."""
        examples = self.sampler.drawn(first, end)
        datasets = self.sampler.dataset.datasets
        return [
            np.unique(data.texts_of(indices), return_counts=True)
            for data, indices in zip(datasets, examples, strict=True)
        ]

    def _count_batches(self, time: str) -> int:
        """Length of a time of the run, as :func:`bge_pruning.utils.clock.count_batches`."""
        if time.endswith("dur"):
            return int(float(time[:-3]) * self._count_batches(self.config.max_duration))
        return int(time[:-2]) * (len(self.sampler) if time.endswith("ep") else 1)

    def prepare(self) -> None:
        """Embed what the run draws from where it goes on, before it does.

        If the weights of the sources change, what is drawn after that is embedded then.
        """
        data, end = self.sampler.dataset, self._count_batches(self.config.max_duration)
        first, changes = data.resume_at, self.config.data.adapt_weights_interval
        if changes is None:
            self._embed(first, end)
            self.teacher.release()
            return
        interval = max(1, self._count_batches(changes))
        self._embed(first, min(first - first % interval + interval, end))
        data.prepare = lambda start, stop: self._embed(start, min(stop, end))

    def _embed(self, first: int, end: int) -> None:
        if first >= end:
            return
        self._fill([numbers for numbers, _ in self._draws(first, end)])

    def _prepare_probes(self) -> None:
        """Embed the batches on which the loss of each source is measured."""
        count = self.config.data.adapt_batches
        self._fill(
            [
                np.unique(data.texts_of(self.sampler.examples_of(source, 0, count)))
                for source, data in enumerate(self.sampler.dataset.datasets)
            ]
        )

    def _fill(self, texts: Sequence[np.ndarray]) -> None:
        # The other ranks find what the first one has written.
        with rank_zero_first():
            fill_caches(self.caches, texts, self.config, self.base, self.teacher)
        for data, cache in zip(self.sampler.dataset.datasets, self.caches, strict=True):
            data.teacher = cache
