"""The logged numbers of a run as curves: which there are, and how people call them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Batches and values of each key.
Series = dict[str, tuple[list[int], list[float]]]

AXIS_TITLES = {
    "layer": "layers",
    "head": "attention heads",
    "intermediate": "intermediate units",
    "hidden": "hidden dimensions",
    "encoder": "encoder parameters",
    "operations": "operations",
}
MAX_POINTS = 400  # more are not told apart on paper, and make a heavy file
NOT_TASK = re.compile(r"total|lagrang|sparsity|pruning|constraint")
LOGGED_SCORE = re.compile(
    r"eval/(?P<task>.+)/(?:(?P<mode>sparse|colbert|dense\+sparse|all)_)?"
    r"(?:cosine_spearman|spearman|ndcg_at_10)"
)
EARLIER_SCORE = re.compile(r"metrics/(?P<task>.+)/(?:SpearmanCorrCoef|cosine_spearman)")


def collect_series(history: Sequence[Mapping[str, Any]]) -> Series:
    """Batches and values of each finite logged number, in order of batch.

    Args:
        history: Rows ``{"batch": int, "metrics": {key: number}}`` in any order; a row need not hold
            every key.
    """
    series: Series = {}
    for row in sorted(history, key=lambda row: row["batch"]):
        for key, value in row["metrics"].items():
            # Not isfinite, which raises for a whole number beyond a float; NaN is not below it.
            if isinstance(value, int | float) and abs(value) < 1e300:
                batches, values = series.setdefault(key, ([], []))
                batches.append(row["batch"])
                values.append(value)
    return series


def pruned_axes(series: Series) -> list[str]:
    """Axes whose expected sparsity was logged, in the order of ``AXIS_TITLES``."""
    prefix = "pruning/expected_sparsity/"
    found = [key.removeprefix(prefix) for key in series if key.startswith(prefix)]
    return sorted(found, key=[*AXIS_TITLES, *found].index)


def task_losses(series: Series) -> list[str]:
    """Keys of the parts of the task loss where they are logged, or else of the total."""
    keys = [key for key in series if key.startswith("loss/train/")]
    return [key for key in keys if not NOT_TASK.search(key)] or keys[:1]


def logged_scores(series: Series) -> dict[str, str]:
    """Key of the main score of each task and mode, under the name that people read.

    ``eval/<task>/<metric>`` (Spearman correlation or nDCG@10) goes before
    ``metrics/<task>/<metric>``, which is the same score over padded batches.
    """
    found = [(match, key) for key in series if (match := LOGGED_SCORE.fullmatch(key))]
    scores = {_score_name(match): key for match, key in found}
    tasks = {match["task"] for match, _ in found}
    for key in series:
        match = EARLIER_SCORE.fullmatch(key)
        if match and match["task"] not in tasks:
            scores[match["task"]] = key
    return scores


def _score_name(match: re.Match[str]) -> str:
    return f"{match['task']}, {match['mode']}" if match["mode"] else match["task"]


def last_constraint(series: Series) -> dict[str, dict[str, float]]:
    """The constraint at the last logged step, as ``pruning.json`` has it after a cut.

    An axis without a target of its own is held to what would be cut.
    """
    constraint = {}
    for axis in pruned_axes(series):
        values = {
            name: series[key][1][-1]
            for name in ("expected_sparsity", "realised_sparsity", "target_sparsity")
            if (key := f"pruning/{name}/{axis}") in series
        }
        if "realised_sparsity" in values:
            constraint[axis] = {"target_sparsity": values["realised_sparsity"], **values}
    return constraint


def thin(batches: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most ``MAX_POINTS`` points, evenly spread, with the first and the last."""
    count = len(batches)
    if count <= MAX_POINTS:
        return list(batches), list(values)
    places = [round(n * (count - 1) / (MAX_POINTS - 1)) for n in range(MAX_POINTS)]
    return [batches[place] for place in places], [values[place] for place in places]


def running_quantiles(values: Sequence[float]) -> tuple[list[int], list[list[float]]]:
    """A running median with the band that holds most of the values.

    Args:
        values: Numbers in order.

    Returns:
        Places in ``values``, at most ``MAX_POINTS``, and at each the 10th, 50th and 90th percentile
        of the values around it.
    """
    import numpy as np

    places, _ = thin(range(len(values)), values)
    reach = max(1, len(values) // 25)
    array = np.asarray(values)
    windows = [array[max(0, place - reach) : place + reach + 1] for place in places]
    return places, [np.percentile(window, [10, 50, 90]).tolist() for window in windows]
