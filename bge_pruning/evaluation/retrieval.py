"""Retrieval scores of a model in every mode, beside its baseline and two floors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bge_pruning.evaluation.retrieval_floors import WordEmbeddings, with_random_weights
from bge_pruning.evaluation.search import MODES, CorpusCache, SearchModel, check_modes
from bge_pruning.evaluation.statistics import bootstrap_interval, paired_p_value
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.pretrained import BaseModel
from bge_pruning.models.scores import OUTPUT_NAMES

METRICS = ("ndcg_at_10", "mrr_at_10", "recall_at_100", "map_at_100")
MAIN_METRIC = "ndcg_at_10"


@dataclass(frozen=True)
class RetrievalScore:
    """Scores of one model in one mode on one task.

    Attributes:
        values: Mean by metric, as mteb computes it.
        by_query: nDCG@10 of each query.
        seconds: Time of indexing, searching and scoring.
    """

    values: dict[str, float]
    by_query: dict[str, float]
    seconds: float


# Scores by task and mode.
Scores = dict[tuple[str, str], RetrievalScore]


def score_retrieval(
    encoder: TextEncoder | WordEmbeddings,
    tasks: Sequence[Any],
    modes: Sequence[str],
    progress: bool = False,
) -> Scores:
    """Scores of one model; modes that it has no head for are left out.

    Args:
        encoder: The model.
        tasks: As :func:`bge_pruning.evaluation.tasks.beir_task` makes them.
        modes: Names of modes.
        progress: Show progress bars.
    """
    import mteb
    from mteb.models import ModelMeta

    names = encoder.names()
    modes = [mode for mode in modes if all(OUTPUT_NAMES[output] in names for output in MODES[mode])]
    meta = ModelMeta.create_empty(overwrites={"name": "bge_pruning/model", "revision": "local"})
    scores: Scores = {}
    for task in tasks:
        outputs = {output for mode in modes for output in MODES[mode]}
        corpora = CorpusCache(encoder, sorted(outputs), progress)
        for mode in modes:
            started = time.perf_counter()
            # mteb's cache calls every local model by one name: the second would get the first's.
            result = mteb.evaluate(
                SearchModel(corpora, mode, meta),
                [task],
                cache=None,
                show_progress_bar=False,
                co2_tracker=False,
            )
            (found,) = result.task_results[0].scores[task.eval_splits[0]]
            values = {metric: float(found[metric]) for metric in METRICS}
            seconds = time.perf_counter() - started
            key = (task.metadata.name, mode)
            scores[key] = RetrievalScore(values, dict(task.by_query), seconds)
    return scores


def evaluate_retrieval(
    model: BaseModel,
    baseline: BaseModel | None,
    tasks: Sequence[Any],
    modes: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Score a model, its baseline and the two floors.

    Args:
        model: The model to judge.
        baseline: The unpruned model, or ``None``.
        tasks: As :func:`bge_pruning.evaluation.tasks.beir_task` makes them.
        modes: Names of modes, see :data:`bge_pruning.evaluation.search.MODES`.
        batch_size: Texts in a batch.
        max_length: Tokens at which texts are cut; ``None`` keeps each model's own limit.
        device: Torch device.
        seed: Seed of the random weights and of the intervals.
        progress: Show progress bars.

    Returns:
        JSON-ready entries, one for each task, mode and metric.

    Raises:
        ValueError: If a mode is unknown or the model has no head for it.
    """
    check_modes(modes, model.heads.names(), model.name)

    def score(base: BaseModel) -> Scores:
        encoder = TextEncoder(base, device, max_length, batch_size)
        return score_retrieval(encoder, tasks, modes, progress)

    scores = {"model": score(model)}
    words = TextEncoder(baseline or model, device, max_length, batch_size)
    scores["word_embeddings"] = score_retrieval(WordEmbeddings(words), tasks, modes)
    if baseline is not None:
        scores["baseline"] = score(baseline)
    scores["random_weights"] = score(with_random_weights(model, seed))
    return [_describe(key, metric, scores, seed) for key in scores["model"] for metric in METRICS]


def _describe(
    key: tuple[str, str], metric: str, scores: Mapping[str, Scores], seed: int
) -> dict[str, Any]:
    """One entry of ``tasks``."""
    ours, theirs = scores["model"][key], scores.get("baseline", {}).get(key)
    value = ours.values[metric]
    baseline = None if theirs is None else theirs.values[metric]
    floors = {
        name: scores[name][key].values[metric]
        for name in ("random_weights", "word_embeddings")
        if key in scores[name]
    }
    floor = max(floors.values())
    above = baseline is not None and baseline > floor
    entry = {
        "task": key[0],
        "mode": key[1],
        "metric": metric,
        "value": value,
        "baseline": baseline,
        "floor": floor,
        "floors": floors,
        "retention": value / baseline if baseline else None,
        "retention_above_floor": (value - floor) / (baseline - floor) if above else None,
        "queries": len(ours.by_query),
        "seconds": ours.seconds,
    }
    if metric == MAIN_METRIC:
        entry["interval"] = list(bootstrap_interval(list(ours.by_query.values()), seed))
        if theirs is not None:
            pairs = np.array([[ours.by_query[q], theirs.by_query[q]] for q in ours.by_query])
            entry["p_value"] = paired_p_value(pairs[:, 0], pairs[:, 1], seed)
    return entry
