"""Baselines: choose what stays without training gates, and cut as for a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from bge_pruning.config.command_checks import check_baseline
from bge_pruning.config.load import Config, ConfigError
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.export.extract import write_model
from bge_pruning.export.extraction import Extraction
from bge_pruning.export.pruning_record import build_record
from bge_pruning.model_io.checkpoint import TrainedModel
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.structural_pruning import SHAPE_FIELDS, PruningMasks
from bge_pruning.selection import layer_choice
from bge_pruning.selection.importance import (
    magnitude_importance,
    masks_of_importance,
    random_importance,
)
from bge_pruning.training.builders import build_base_model, build_metadata
from bge_pruning.training.calibration import calibration_texts, measure_importance
from bge_pruning.training.plan import Plan, fetch_plan
from bge_pruning.training.sources import build_source
from bge_pruning.utils.embedding_metrics import is_flat
from bge_pruning.utils.environment import torch_device

log = logging.getLogger(__name__)


def plan_baseline(config: Config) -> Plan:
    """Validate the configuration of a baseline before loading any weights, and return the plan.

    Raises:
        ConfigError: If the method trains gates, or the configuration does not fit itself or the
            model.
        OSError: If the model cannot be loaded.
    """
    check_baseline(config)
    plan = fetch_plan(config)
    shape_of(config, plan, plan.source)
    return plan


def shape_of(config: Config, plan: Plan, source: EncoderShape) -> EncoderShape:
    """Return the sizes that a baseline is cut to from those of the loaded model.

    Raises:
        ConfigError: If no layer fits.
    """
    if config.method == "layers" and plan.target_speedup is None:
        budget = plan.target_parameters
        if plan.target is not None:
            budget = count_parameters(plan.target).encoder
        try:
            return replace(source, num_hidden_layers=layer_choice.layers_within(source, budget))
        except ValueError as error:
            raise ConfigError(f"method 'layers': {error}") from None
    return replace(source, **{f: getattr(plan.target, f) for f in SHAPE_FIELDS.values()})


def cut_baseline(config: Config, output: Path, overwrite: bool = False) -> dict[str, Any]:
    """Choose what stays, write the cut model, not recovered yet, and return its ``pruning.json``.

    Raises:
        FileExistsError: If the folder exists and is not to be replaced.
    """
    plan = plan_baseline(config)

    def start() -> Extraction:
        base = build_base_model(config)
        shape = shape_of(config, plan, base.shape)
        masks = choose_masks(config, base, shape)
        for module in (base.backbone, base.heads):
            module.cpu()  # as extraction needs them
        metadata = build_metadata(config, plan, base)
        model = TrainedModel(metadata, base.shape, base.backbone, base.heads, None, batch=0)
        keep = base.backbone.keep_indices(masks)
        log.info("method '%s' keeps layers %s", config.method, ", ".join(map(str, keep.layer)))
        record = build_record(model, shape, keep, config.method)
        return Extraction(base, masks, keep, shape, record)

    return write_model(start, output, overwrite)


def choose_masks(config: Config, base: BaseModel, shape: EncoderShape) -> PruningMasks:
    """Choose the binary gates that keep ``shape``; the model may be moved to the run's device."""
    if config.method == "layers":
        kept = _choose_layers(config, base, shape)
        return layer_choice.layer_masks(kept, base.shape.num_hidden_layers)
    if config.method == "random":
        importance = random_importance(base.shape, config.seed)
    elif config.method == "magnitude":
        importance = magnitude_importance(base.backbone)
    else:
        importance = measure_importance(config.method, config, base)
    return masks_of_importance(importance, shape)


def _choose_layers(config: Config, base: BaseModel, shape: EncoderShape) -> list[int]:
    layers, keep = base.shape.num_hidden_layers, shape.num_hidden_layers
    if config.baseline.layer_choice == "every_nth":
        return layer_choice.every_nth_layer(layers, keep)
    score = layer_score(config, base)

    def score_and_log(kept: Sequence[int]) -> float:
        found = score(kept)
        log.info("layers %s: %.4f", ", ".join(map(str, kept)), found)
        return found

    return layer_choice.best_layers(layers, keep, score_and_log)


def layer_score(config: Config, base: BaseModel) -> Callable[[Sequence[int]], float]:
    """Return a function that scores kept layers, in ascending order, before any training.

    With scored pairs in ``data.eval`` the score is the mean of their Spearman correlations.
    Otherwise it is the mean cosine of dense vectors of the calibration texts with those of the
    unpruned model.
    """
    size, length = config.eval_batch_size, config.model.max_length
    encoder = TextEncoder(base, torch_device(config.device), length, size)
    sources = [source for source in config.data.eval if source.kind == "sts"]
    pairs = [build_source(source, config, base, None, "") for source in sources]
    texts = None if pairs else calibration_texts(config, base, config.baseline.calibration_texts)
    original = None if pairs else _dense_vecs(encoder, texts)

    def score(kept: Sequence[int]) -> float:
        gates = layer_choice.layer_masks(kept, base.shape.num_hidden_layers).layer
        encoder.masks = PruningMasks(layer=gates.to(encoder.device))
        if not pairs:
            return float((_dense_vecs(encoder, texts) * original).sum(1).mean())
        return fmean(_spearman(encoder, part.texts, part.examples, part.scores) for part in pairs)

    return score


def _spearman(
    encoder: TextEncoder, texts: TokenizedTexts, examples: np.ndarray, gold: np.ndarray
) -> float:
    vectors = _dense_vecs(encoder, texts)
    cosines = (vectors[examples[:, 0]] * vectors[examples[:, 1]]).sum(1)
    return 0.0 if is_flat(cosines) else float(spearmanr(cosines, gold).statistic)


def _dense_vecs(encoder: TextEncoder, texts: TokenizedTexts) -> np.ndarray:
    """Return L2-normalised vectors, shape ``(n, H)``."""
    vectors = np.empty((len(texts), encoder.dense_size), np.float32)
    for index, _, _, outputs in encoder.batches(texts, ("dense_vecs",)):
        vectors[index] = outputs["dense_vecs"].float().cpu().numpy()
    return vectors
