"""From the configuration to batches: training data, evaluators and the teacher's vectors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Evaluator
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bge_pruning.config_schema import Config, ConfigError, SourceConfig
from bge_pruning.datasets.contrastive_dataset import (
    ContrastiveDataset,
    index_rows,
    read_contrastive,
)
from bge_pruning.datasets.embedding_dataset import (
    Collator,
    EmbeddingDataset,
    TokenizedTexts,
    tokenize,
)
from bge_pruning.datasets.length_grouped_sampler import LengthGroupedSampler
from bge_pruning.datasets.mteb_dataloader import read_beir
from bge_pruning.datasets.sts_dataloader import MAX_SCORE, read_sentences, read_sts
from bge_pruning.datasets.teacher_vectors import cached_teacher_outputs, compute_cache_key
from bge_pruning.models.composer_bge_m3 import LossWeights
from bge_pruning.models.model_files import read_vocabulary
from bge_pruning.models.pretrained import BaseModel
from bge_pruning.models.teacher import Teacher

log = logging.getLogger(__name__)


def build_loss_weights(config: Config) -> LossWeights:
    """What to optimise."""
    values = vars(config.loss)
    return LossWeights(**{**values, "contrastive_outputs": tuple(config.loss.contrastive_outputs)})


def check_objective(config: Config) -> None:
    """Refuse losses and data that do not fit each other.

    Raises:
        ConfigError: If nothing is optimised, data is missing or of the wrong kind, or a loss over
            the batch would change because the batch is split.
    """
    weights = build_loss_weights(config)
    # Rows of queries with passages are the same wherever they come from.
    kinds = {"contrastive" if s.kind == "beir" else s.kind for s in config.data.train}
    if not config.data.train:
        raise ConfigError("data.train is empty. To fix, add configs/training/sts_only.yaml.")
    unsupported = kinds - {"sts", "sentences", "contrastive"}
    if unsupported:
        raise ConfigError(
            f"data of kind {', '.join(sorted(unsupported))} cannot be trained on in this version. "
            f"To fix, use kind sts, sentences, contrastive or beir."
        )
    if len(kinds) > 1:
        raise ConfigError(
            f"data.train mixes kinds {' and '.join(sorted(kinds))}, which this version cannot. To "
            f"fix, use one kind for all (sentences also reads sts files, without their scores)."
        )
    _check_losses_fit(weights, kinds)
    micro = config.device_train_microbatch_size
    per_device = config.global_train_batch_size // dist.get_world_size()
    whole = ("cosent", "distillation_similarity", "contrastive", "self_distillation")
    for name in whole:
        if micro is not None and micro < per_device and getattr(weights, name):
            raise ConfigError(
                f"device_train_microbatch_size {micro} splits the batch of {per_device}, and "
                f"loss.{name} compares all texts of a batch: it would silently become another "
                f"loss. To fix, leave device_train_microbatch_size out, or set loss.{name}=0."
            )


def _check_losses_fit(weights: LossWeights, kinds: set[str]) -> None:
    """Every loss has the kind of data that it needs."""
    needs = {
        "sts_regression": "sts",
        "cosent": "sts",
        "contrastive": "contrastive",
        "self_distillation": "contrastive",
    }
    if not weights.distils and not any(getattr(weights, name) for name in needs):
        raise ConfigError("all weights under loss are 0. To fix, set e.g. loss.sts_regression=1.")
    for name, kind in needs.items():
        if getattr(weights, name) and kinds != {kind}:
            raise ConfigError(
                f"loss.{name} needs data.train of kind {kind}. To fix, set it to 0 or add such "
                f"data."
            )
    if weights.self_distillation and set(weights.contrastive_outputs) <= {"dense"}:
        raise ConfigError(
            "loss.self_distillation needs an ensemble of two outputs or more. To fix, add sparse "
            "or colbert to loss.contrastive_outputs, or set it to 0."
        )


def build_train_loader(config: Config, base: BaseModel, teacher: Teacher | None) -> DataSpec:
    """Training batches of this rank.

    Raises:
        ConfigError: If the teacher would read other words in the student's token ids.
        ValueError: If the data is wrong.
    """
    if teacher is not None and teacher.vocabulary() != read_vocabulary(base.tokenizer_files):
        raise ConfigError(
            f"teacher '{teacher.name}' and {base.name} have different tokenizers: the same ids "
            f"mean other words to it. To fix, distil from the model that {base.name} came from."
        )
    dataset: EmbeddingDataset | ContrastiveDataset
    if config.data.train[0].kind in ("contrastive", "beir"):
        dataset = _build_contrastive(config, base)
    else:
        dataset = _build_dataset(config.data.train, config, base)
    if teacher is not None and config.teacher.cache:
        dataset.teacher = _teacher_outputs(config, base, teacher, dataset.texts)
    ranks = dist.get_world_size()
    sampler = LengthGroupedSampler(
        dataset,
        dataset.lengths,
        config.global_train_batch_size,
        num_replicas=ranks,
        rank=dist.get_global_rank(),
        seed=config.seed,
        epoch_in_index=isinstance(dataset, ContrastiveDataset),
    )
    return _data_spec(
        dataset,
        batch_size=config.global_train_batch_size // ranks,
        sampler=sampler,
        drop_last=True,
        collate_fn=Collator(base.hf_config["pad_token_id"]),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _data_spec(dataset: Dataset, **arguments: Any) -> DataSpec:
    return DataSpec(DataLoader(dataset, **arguments), split_batch=_split_batch)


def _split_batch(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    # Composer's own splitting warns at every last batch that is smaller than the others.
    starts = range(0, len(batch["input_ids"]), size)
    return [{key: value[i : i + size] for key, value in batch.items()} for i in starts]


def build_evaluators(config: Config, base: BaseModel) -> list[Evaluator]:
    """One evaluator per held-out file of scored pairs."""
    evaluators = []
    for source in config.data.eval:
        if source.kind != "sts":
            raise ConfigError(
                f"data.eval '{source.name}' is of kind {source.kind}; only kind sts is evaluated "
                f"during training in this version. To fix, remove it."
            )
        dataset = _build_dataset([source], config, base)
        # Pairs of similar length together: less padding, and the metric does not see the order.
        order = np.argsort(dataset.lengths, kind="stable")
        dataset = EmbeddingDataset(dataset.texts, dataset.examples[order], dataset.scores[order])
        loader = _data_spec(
            dataset,
            batch_size=config.eval_batch_size,
            sampler=dist.get_sampler(dataset, shuffle=False),
            collate_fn=Collator(base.hf_config["pad_token_id"]),
        )
        evaluators.append(
            Evaluator(label=source.name, dataloader=loader, metric_names=["cosine_spearman"])
        )
    return evaluators


def _build_dataset(
    sources: list[SourceConfig], config: Config, base: BaseModel
) -> EmbeddingDataset:
    """All files of one kind, tokenised."""
    scored = sources[0].kind == "sts"
    texts: list[str] = []
    scores: list[float] = []
    for source in sources:
        if scored:
            pairs = read_sts(source.path)
            rows = zip(pairs.sentences1, pairs.sentences2, strict=True)
            texts += [text for pair in rows for text in pair]
            scores += [score / MAX_SCORE for score in pairs.scores]
        else:
            texts += read_sentences(source.path)
    if not scored:
        texts = list(dict.fromkeys(texts))
    tokens = _tokenize(texts, config, base)
    examples = np.arange(len(texts)).reshape(-1, 2 if scored else 1)
    return EmbeddingDataset(tokens, examples, np.array(scores, np.float32) if scored else None)


def _build_contrastive(config: Config, base: BaseModel) -> ContrastiveDataset:
    """Queries with passages of all files and collections."""
    readers = {"contrastive": read_contrastive, "beir": read_beir}
    sources = config.data.train
    texts, rows = index_rows(chain.from_iterable(readers[s.kind](s.path) for s in sources))
    try:
        return ContrastiveDataset(
            _tokenize(texts, config, base), rows, config.data.negatives, config.seed
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _tokenize(texts: list[str], config: Config, base: BaseModel) -> TokenizedTexts:
    max_length = min(config.model.max_length, base.max_seq_length)
    tokens = tokenize(texts, base.tokenizer_files["tokenizer.json"], max_length)
    if tokens.truncated:
        log.info("%d of %d texts cut at %d tokens", tokens.truncated, len(tokens), max_length)
    return tokens


def _teacher_outputs(
    config: Config, base: BaseModel, teacher: Teacher, texts: TokenizedTexts
) -> dict[str, np.ndarray]:
    key = compute_cache_key(texts, teacher.fingerprint())
    folder = Path(config.data.processed_folder)
    paths = {name: folder / f"teacher-{key}-{name}.npy" for name in teacher.names}

    def encode(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return teacher.encoder()(ids.to(_device_name(config)), mask.to(_device_name(config)))

    # The other ranks find the file that the first one wrote.
    with _rank_zero_first():
        return cached_teacher_outputs(texts, encode, base.hf_config["pad_token_id"], paths)


def _device_name(config: Config) -> str:
    gpu = config.device == "gpu" or (config.device is None and torch.cuda.is_available())
    return "cuda" if gpu else "cpu"


@contextmanager
def _rank_zero_first() -> Iterator[None]:
    if dist.get_local_rank() != 0:
        dist.barrier()
    yield
    if dist.get_local_rank() == 0:
        dist.barrier()
