"""Scores of a model, its baseline and the floors as the entries of a results file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bge_pruning.evaluation.scoring import Score, Scores
from bge_pruning.evaluation.statistics import (
    bootstrap_correlation_interval,
    bootstrap_interval,
    paired_correlation_p_value,
    paired_p_value,
)
from bge_pruning.evaluation.tasks import SIMILARITY, Task

FLOORS = ("random_weights", "word_embeddings")


def describe_task(
    task: Task, mode: str, scores: Mapping[str, Scores], also: Mapping[str, Scores], seed: int
) -> list[dict[str, Any]]:
    """One entry for each metric of a task in a mode.

    ``retention`` is value / baseline; ``retention_above_floor`` is (value - floor) / (baseline -
    floor) with the larger floor. Both are ``None`` where the divisor is not above 0. The main
    metric has a 95 % ``interval`` over queries or pairs and the ``p_value`` of a paired test.

    Args:
        task: The task.
        mode: One of ``MODES``.
        scores: Under ``model``, ``baseline`` (if there is one) and each of ``FLOORS``.
        also: Of further models, by name.
        seed: Seed of the interval and the test.
    """
    key = (task.name, mode)
    ours = scores["model"][key]
    theirs = scores.get("baseline", {}).get(key)
    entries = []
    for index, metric in enumerate(ours.values):
        entry = {
            "task": task.name,
            "kind": task.kind,
            "mode": mode,
            "metric": metric,
            "main": index == 0,
            "value": ours.values[metric],
            **_compare(metric, key, scores, also),
            "samples": len(ours.samples),
            "texts": ours.texts,
            "truncated": ours.truncated,
            "seconds": ours.seconds,
        }
        if index == 0:
            entry |= _uncertainty(task, ours, theirs, seed)
        entries.append(entry)
    return entries


def _compare(
    metric: str,
    key: tuple[str, str],
    scores: Mapping[str, Scores],
    also: Mapping[str, Scores],
) -> dict[str, Any]:
    """What the value stands beside."""
    value = scores["model"][key].values[metric]
    theirs = scores.get("baseline", {}).get(key)
    baseline = None if theirs is None else theirs.values[metric]
    floors = {name: scores[name][key].values[metric] for name in FLOORS if key in scores[name]}
    floor = max(floors.values())
    above = baseline is not None and baseline > floor
    found = {
        "baseline": baseline,
        "floor": floor,
        "floors": floors,
        "retention": value / baseline if baseline is not None and baseline > 0 else None,
        "retention_above_floor": (value - floor) / (baseline - floor) if above else None,
    }
    if also:
        found["also"] = {
            name: s[key].values[metric] if key in s else None for name, s in also.items()
        }
    return found


def _uncertainty(task: Task, ours: Score, theirs: Score | None, seed: int) -> dict[str, Any]:
    if task.kind == SIMILARITY:
        gold = np.array(task.pairs()[2])
        found = {"interval": bootstrap_correlation_interval(ours.samples, gold, seed)}
        if theirs is not None:
            p = paired_correlation_p_value(ours.samples, theirs.samples, gold, seed)
            found["p_value"] = p
    else:
        found = {"interval": bootstrap_interval(ours.samples, seed)}
        if theirs is not None:
            found["p_value"] = paired_p_value(ours.samples, theirs.samples, seed)
    return {**found, "interval": list(found["interval"])}
