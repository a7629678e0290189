"""Build training batches, evaluators, collections and the teacher's outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from composer import Evaluator
from composer.core import DataSpec, Event, State, Time
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from bge_pruning.config.data_checks import mixture_ends
from bge_pruning.config.names import PAIR_METRIC
from bge_pruning.config.schema import Config, ConfigError, SourceConfig
from bge_pruning.datasets.embedding_dataset import (
    Batch,
    Collator,
    EmbeddingDataset,
    TokenizedTexts,
    build_tokenizer,
)
from bge_pruning.datasets.mixed_dataloader import (
    MixedBatchSampler,
    MixedDataset,
    MixSchedule,
    group_batches,
    padding_share,
)
from bge_pruning.datasets.mteb_tasks import random_state_kept
from bge_pruning.datasets.teacher_vectors import Vectors
from bge_pruning.evaluation.tasks import Task, beir_task, mteb_task, parallel_task
from bge_pruning.model_io.model_files import PROMPT_NAMES, find_prompt
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.model_io.teacher_folder import Teacher
from bge_pruning.training.rank_watch import ask_rank_zero, rank_zero_first
from bge_pruning.training.sources import SourceDataset, build_source
from bge_pruning.training.teacher_cache import fill_caches, open_cache
from bge_pruning.utils.clock import is_due

log = logging.getLogger(__name__)


def build_train_loader(config: Config, base: BaseModel, teacher: Teacher | None) -> DataSpec:
    """Build the training batches of this rank, each of one source.

    Raises:
        ValueError: If the data are invalid, or the teacher does not fit the student.
    """
    if teacher is not None and (mismatch := teacher.find_mismatch(base)):
        raise ConfigError(mismatch)
    own = [find_prompt(base.prompts, role) for role in PROMPT_NAMES]
    if teacher is not None and (others := teacher.prompts()) != own:
        log.warning(
            "teacher '%s' has other prompts than %s: it gets texts with those of the student, %s, "
            "not %s, for queries, passages and other texts",
            *(teacher.name, base.name, own, others),
        )
    # The other ranks find the files that the first one has written.
    with rank_zero_first():
        datasets = [_build_dataset(source, config, base, teacher) for source in config.data.train]
    if teacher is not None:
        teacher.release()  # it was needed to mine, and may not be needed again
    _check_scores(config, [getattr(dataset, "scored", False) for dataset in datasets])
    size, ranks = config.global_train_batch_size, dist.get_world_size()
    lengths, sources = [dataset.lengths for dataset in datasets], config.data.train
    counts = [len(n) // size for n in lengths]
    weights = [s.weight or max(1, n) for s, n in zip(sources, counts, strict=True)]
    names = [source.name for source in sources]
    _check_same(names, lengths)
    schedule = _build_schedule(config, dict(zip(names, weights, strict=True)), sum(counts))
    mixed = MixedDataset(names, datasets, schedule, size)
    sampler = MixedBatchSampler(
        mixed, lengths, ranks, dist.get_global_rank(), config.seed, config.data.group_by_length
    )
    last = mixture_ends(config, sum(counts)) or [1]
    log.info("sources\n%s", render_sources(mixed, config.seed, schedule.shares(last[-1])))
    return _data_spec(
        mixed,
        batch_sampler=sampler,
        collate_fn=Collator(base.hf_config["pad_token_id"]),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _build_schedule(config: Config, weights: Mapping[str, float], epoch: int) -> MixSchedule:
    """Which source each batch comes from, by the weights of all and what ``data.stages`` says."""
    starts = [0, *mixture_ends(config, epoch)[:-1]]
    given = [part.weights for part in config.data.stages] or [{}]
    parts = [
        [part.get(name, 0.0) for name in weights] if part else [*weights.values()] for part in given
    ]
    return MixSchedule(parts[0], list(zip(starts, parts, strict=True))[1:])


def _check_same(names: Sequence[str], lengths: Sequence[np.ndarray]) -> None:
    """Refuse data that are not rank 0's: each rank would plan other batches."""
    hashes = [sha256(np.ascontiguousarray(n).tobytes()).hexdigest() for n in lengths]
    for name, own, first in zip(names, hashes, ask_rank_zero(lambda: hashes), strict=True):
        if own != first:
            raise ConfigError(
                f"data source '{name}' is not the same on rank {dist.get_global_rank()} and rank 0."
                f" To fix, copy its files and data.processed_folder to every machine, or share "
                f"them."
            )


def _check_scores(config: Config, scored: Sequence[bool]) -> None:
    """Refuse ``score_distillation`` where sources have no scores and no other loss."""
    loss = config.loss
    if not loss.score_distillation:
        return
    if not any(scored):
        raise ConfigError(
            "loss.score_distillation needs rows with pos_scores and neg_scores, and no source has "
            "any. To fix, add them or set it to 0."
        )
    for source, has_scores in zip(config.data.train, scored, strict=True):
        others = loss.contrastive or loss.self_distillation or loss.distils
        if source.has_passages and not has_scores and not others:
            raise ConfigError(
                f"no loss applies to data source '{source.name}': its rows have no pos_scores and "
                f"neg_scores. To fix, add them, set a weight under loss that needs none, such as "
                f"loss.contrastive, or remove the source."
            )


def _build_dataset(
    source: SourceConfig, config: Config, base: BaseModel, teacher: Teacher | None
) -> SourceDataset:
    """Build the examples of a source, without the teacher's outputs."""

    def embed(texts: TokenizedTexts, numbers: np.ndarray) -> Vectors:
        cache = open_cache(config, teacher, texts, ("dense_vecs",))
        fill_caches([cache], [np.unique(numbers)], config, base, teacher)
        return Vectors(cache.outputs["dense_vecs"], numbers)

    model = teacher.fingerprint() if source.mined_negatives else ""
    return build_source(source, config, base, embed, model)


def build_probes(loader: DataLoader, batches: int, source: int) -> list[Batch]:
    """Read up to so many first batches of the source with this index on this rank."""
    rows = loader.batch_sampler.rows_of(source, epoch=0)[:batches]
    return [loader.collate_fn([loader.dataset[source, row] for row in part]) for part in rows]


def render_sources(mixed: MixedDataset, seed: int, shares: np.ndarray) -> str:
    """Render the sources as a table: rows, texts, share of the batches, tokens, padding."""
    head = f"{'source':<26} {'rows':>9} {'texts':>10} {'share':>6} {'tokens':>6}"
    lines = [f"{head} {'padding':>8} {'random':>7}"]
    for name, data, share in zip(mixed.names, mixed.datasets, shares, strict=True):
        lengths, tokens = data.lengths, data.tokens
        groups = [group_batches(lengths, mixed.batch_size, (seed, 0), by) for by in (True, False)]
        padding = [padding_share(lengths, tokens, data.width, group) for group in groups]
        lines.append(
            f"{name:<26} {len(data):>9,} {len(data.texts):>10,} {share:>6.1%} "
            f"{tokens.mean() / data.width:>6.1f} {padding[0]:>8.1%} {padding[1]:>7.1%}"
        )
    return "\n".join(lines)


def _data_spec(dataset: Dataset, **arguments: Any) -> DataSpec:
    return DataSpec(
        DataLoader(dataset, **arguments),
        split_batch=_split_batch,
        get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
        get_num_tokens_in_batch=lambda batch: sum(map(sum, batch["lengths"])),
    )


def _split_batch(batch: Batch, size: int) -> list[Batch]:
    # Composer's own split warns at every last batch that is smaller than the others.
    return [
        {k: v if isinstance(v, str) else v[i : i + size] for k, v in batch.items()}
        for i in range(0, len(batch["input_ids"]), size)
    ]


def build_evaluators(config: Config, base: BaseModel) -> list[Evaluator]:
    """Build an evaluator for each held-out file of scored pairs."""
    interval = Time.from_timestring(config.eval_interval)

    def is_now(state: State, event: Event) -> bool:
        # Composer itself would evaluate the last time after the last checkpoint.
        return event == Event.BATCH_END and is_due(interval, state)

    evaluators = []
    for source in config.data.eval:
        if source.kind != "sts":
            continue
        with rank_zero_first():
            dataset = build_source(source, config, base, None, "")
        # Sorting by length saves padding; the metric does not depend on the order.
        order = np.argsort(dataset.lengths, kind="stable")
        dataset = EmbeddingDataset(dataset.texts, dataset.examples[order], dataset.scores[order])
        loader = _data_spec(
            dataset,
            batch_size=config.eval_batch_size,
            sampler=dist.get_sampler(dataset, shuffle=False),
            generator=torch.Generator(),  # it draws a seed, which must not be a number of the run
            collate_fn=Collator(base.hf_config["pad_token_id"]),
        )
        metrics = {"metric_names": [PAIR_METRIC], "eval_interval": is_now}
        evaluators.append(Evaluator(label=source.name, dataloader=loader, **metrics))
    return evaluators


def build_collections(config: Config, base: BaseModel) -> dict[str, Task]:
    """Read the held-out retrieval collections by name, so that errors come before training.

    Raises:
        FileNotFoundError: If a collection is missing.
        ValueError: If a collection is invalid, or its texts would have no room.
    """
    collections: dict[str, Task] = {}
    for source in config.data.eval:
        if not source.is_collection:
            continue
        if (length := config.evaluation.max_length) is not None:  # refused if it is too short
            build_tokenizer(base.tokenizer_files["tokenizer.json"], length)
        # mteb seeds all generators; the other ranks find what the first one has fetched.
        with rank_zero_first(), random_state_kept():
            if source.kind == "beir":
                collections[source.name] = beir_task(source.place, source.split)
            elif source.kind == "parallel":
                skip = config.data.on_bad_row == "skip"
                collections[source.name] = parallel_task(
                    source.place, source.languages, source.lines, skip
                )
            else:
                collections[source.name] = mteb_task(source.place, source.split, source.subset)
    return collections
