"""Scores one model on tasks, in every mode, with the harness of ``mteb``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bge_pruning.config.names import RETRIEVAL_METRICS
from bge_pruning.evaluation.search import MODES, CorpusCache, SearchModel
from bge_pruning.evaluation.similarity import PairCache, SimilarityModel, side_prompt
from bge_pruning.evaluation.tasks import RETRIEVAL, SIMILARITY, Task
from bge_pruning.evaluation.text_encoder import Encoder
from bge_pruning.models.embedding_heads import OUTPUT_NAMES
from bge_pruning.utils.embedding_metrics import is_flat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """Scores of one model in one mode on one task.

    Attributes:
        values: By metric, as mteb computes them; the first is the main one.
        samples: nDCG@10 of each query by its id, or the similarity of each pair in order.
        truncated: How many of them were truncated at the model's limit.
        seconds: Time of embedding (counted in the first mode only), comparing and scoring.
    """

    values: dict[str, float]
    samples: np.ndarray = field(repr=False)
    texts: int
    truncated: int
    seconds: float


# Scores by task and mode.
Scores = dict[tuple[str, str], Score]


def metric_names(kind: str, mode: str) -> tuple[str, ...]:
    """What mteb calls the metrics, the main one first; only dense similarities are cosines."""
    if kind == RETRIEVAL:
        return RETRIEVAL_METRICS
    prefix = "cosine_" if mode == "dense" else ""
    return (f"{prefix}spearman", f"{prefix}pearson")


def score_tasks(
    encoder: Encoder, tasks: Sequence[Task], modes: Sequence[str], progress: bool = False
) -> Scores:
    """Score one model; modes that it has no head for are left out.

    Returns:
        The scores. Where all similarities of a task are equal, for example 0 from an output that
        is dead or was never trained, the correlation counts as 0.

    Raises:
        ValueError: If an output is not finite.
    """
    names = encoder.names()
    modes = [mode for mode in modes if all(OUTPUT_NAMES[output] in names for output in MODES[mode])]
    outputs = sorted({output for mode in modes for output in MODES[mode]})
    scores: Scores = {}
    for task in tasks if modes else ():
        if task.kind == SIMILARITY:
            found = _score_similarity(encoder, task, modes, outputs, progress)
        else:
            found = _score_retrieval(encoder, task, modes, outputs, progress)
        scores |= {(task.name, mode): score for mode, score in found.items()}
    return scores


def _score_retrieval(
    encoder: Encoder, task: Task, modes: Sequence[str], outputs: Sequence[str], progress: bool
) -> dict[str, Score]:
    corpora = CorpusCache(encoder, outputs, progress)
    scores = {}
    for mode in modes:
        started = time.perf_counter()
        model = SearchModel(corpora, mode, _meta())
        values = _run(model, task, mode)
        samples = np.array([task.by_query[query] for query in sorted(task.by_query)])
        seconds = time.perf_counter() - started
        scores[mode] = Score(values, samples, model.texts, model.truncated, seconds)
    return scores


def _score_similarity(
    encoder: Encoder, task: Task, modes: Sequence[str], outputs: Sequence[str], progress: bool
) -> dict[str, Score]:
    started = time.perf_counter()
    first, second, _ = task.pairs()
    mteb_task = task.mteb_task
    prompts = tuple(
        side_prompt(encoder, kind, mteb_task.metadata)
        for kind in (mteb_task.input1_prompt_type, mteb_task.input2_prompt_type)
    )
    cache = PairCache(encoder, first, second, outputs, progress, prompts)
    scores = {}
    for mode in modes:
        samples = cache.scores(mode)
        if is_flat(samples):
            log.warning(
                "%s: every %s similarity is %g: it counts as 0", task.name, mode, samples[0]
            )
            values = dict.fromkeys(metric_names(SIMILARITY, mode), 0.0)
        else:
            values = _run(SimilarityModel(cache, mode, _meta()), task, mode)
        seconds = time.perf_counter() - started
        scores[mode] = Score(values, samples, len(cache.texts), cache.truncated, seconds)
        started = time.perf_counter()
    return scores


def _meta() -> Any:
    from mteb.models import ModelMeta

    return ModelMeta.create_empty(overwrites={"name": "bge_pruning/model", "revision": "local"})


def _run(model: SearchModel | SimilarityModel, task: Task, mode: str) -> dict[str, float]:
    import mteb

    # mteb's cache has one name for all local models: the second would get the scores of the first.
    result = mteb.evaluate(
        model, [task.mteb_task], cache=None, show_progress_bar=False, co2_tracker=False
    )
    (found,) = result.task_results[0].scores[task.split]
    return {metric: float(found[metric]) for metric in metric_names(task.kind, mode)}
