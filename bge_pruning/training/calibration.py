"""Measure importances on a few training texts, order gates by them, and refit a cut model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bge_pruning.config.load import Config, ConfigError
from bge_pruning.datasets.embedding_dataset import TokenizedTexts, pad_texts
from bge_pruning.datasets.mixed_dataloader import BATCH_TOKENS, batch_indices
from bge_pruning.model_io.model_files import read_vocabulary
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.selection.importance import Importance, activation_importance
from bge_pruning.selection.reconstruction import refit_
from bge_pruning.selection.reconstruction_importance import reconstruction_importance
from bge_pruning.selection.sensitivity import weigh_tokens
from bge_pruning.training.sources import build_corpus
from bge_pruning.utils.environment import torch_device

log = logging.getLogger(__name__)


def calibration_texts(config: Config, base: BaseModel, count: int) -> TokenizedTexts:
    """Draw up to so many of all training texts, with equal probability, by the run's seed."""
    corpora = [build_corpus(source, config, base).texts for source in config.data.train]
    bounds = np.cumsum([0, *map(len, corpora)])
    count = min(count, int(bounds[-1]))
    chosen = np.random.default_rng(config.seed).choice(bounds[-1], count, replace=False)
    parts = np.searchsorted(bounds, chosen, side="right") - 1
    rows = [corpora[part][index - bounds[part]] for part, index in zip(parts, chosen, strict=True)]
    starts = np.cumsum([0, *map(len, rows)])
    return TokenizedTexts(np.concatenate(rows), starts, truncated=0)


def calibration_batches(
    config: Config, base: BaseModel, count: int, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over token ids and masks, ``(B, T)``, of calibration texts, sorted by length."""
    texts = calibration_texts(config, base, count)
    yield from pad_batches(texts, range(len(texts)), config, base, device)


def pad_batches(
    texts: TokenizedTexts, part: Sequence[int], config: Config, base: BaseModel, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over token ids and masks, ``(B, T)``, of the texts ``part``, sorted by length."""
    part = np.asarray(part)
    for index in batch_indices(texts.lengths[part], config.eval_batch_size, BATCH_TOKENS):
        ids, mask = pad_texts([texts[i] for i in part[index]], base.hf_config["pad_token_id"])
        yield ids.to(device), mask.to(device)


def measure_importance(kind: str, config: Config, base: BaseModel) -> Importance:
    """Measure the importance of the structures of a model on texts of the training data.

    Args:
        kind: ``activation`` or ``reconstruction``.
        base: The unpruned model; it is moved to the run's device.
    """
    device = torch_device(config.device)
    batches = calibration_batches(config, base, config.baseline.calibration_texts, device)
    training = base.backbone.training
    backbone, heads = base.backbone.to(device).eval(), base.heads.to(device).eval()
    if kind == "activation":
        importance = activation_importance(backbone, batches)
    else:
        importance = reconstruction_importance(backbone, heads, batches, config.seed)
    backbone.train(training)
    heads.train(training)
    return importance


def refit(config: Config, base: BaseModel) -> None:
    """Fit an extracted model in place to the model that it was cut from, see :func:`refit_`.

    It is moved to the run's device.

    Raises:
        ConfigError: If the model was not extracted, or has other tokens than its source.
    """
    if base.pruning is None:
        raise ConfigError(
            f"teacher.refit_texts fits an extracted model to the one that it was cut from, and "
            f"{base.name} has no pruning.json. To fix, set teacher.refit_texts=0."
        )
    started, device = time.monotonic(), torch_device(config.device)
    source, kept = base.pruning.source, base.pruning.kept
    teacher = load_base_model(source.base_model, source.revision, base.heads.pooling)
    if read_vocabulary(teacher.tokenizer_files) != read_vocabulary(base.tokenizer_files):
        raise ConfigError(
            f"{base.name} has other tokens than {teacher.name}, which it was cut from, and cannot "
            f"be fitted to it. To fix, set teacher.refit_texts=0."
        )
    batches = list(calibration_batches(config, base, config.teacher.refit_texts, device))
    training = base.backbone.training
    student = base.backbone.to(device).eval()
    whole, heads = teacher.backbone.to(device).eval(), teacher.heads.to(device).eval()
    texts = weigh_tokens(whole, heads, batches, config.seed)
    refit_(student, whole, kept.layer, kept.hidden, texts)
    student.train(training)
    count, seconds = sum(len(ids) for ids, _ in batches), time.monotonic() - started
    log.info("fitted to %s on %d texts in %.0f s", teacher.name, count, seconds)


def order_gates(config: Config, base: BaseModel, gates: torch.nn.ParameterDict) -> None:
    """Sort the start values of gates, by axis, in place by the importance of what they close.

    The unpruned model is moved to the run's device.
    """
    kind, texts = config.model.l0_module.init_order, config.baseline.calibration_texts
    log.info("ordering the gates by %s on %d texts", kind, texts)
    importance = measure_importance(kind, config, base)
    for axis, log_alpha in gates.items():
        places = getattr(importance, axis).argsort(dim=-1, stable=True).argsort(dim=-1)
        ascending = log_alpha.detach().sort(dim=-1).values
        log_alpha.data.copy_(ascending.gather(-1, places.to(log_alpha.device)))
