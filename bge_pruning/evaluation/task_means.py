"""What each output is worth over all tasks of a kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from bge_pruning.evaluation.statistics import interval_of
from bge_pruning.evaluation.tasks import RETRIEVAL, SIMILARITY
from bge_pruning.utils.records import Entry


def describe_means(
    entries: Sequence[Entry], drawn: Mapping[tuple[str, str], np.ndarray]
) -> list[Entry]:
    """The mean score of each mode over the tasks of a kind; none of a kind with one task.

    What is kept is that of the mean score. The 95 % ``interval`` is over queries or pairs. Tasks of
    equal size are drawn from alike: where they are translations of each other, what is hard in one
    language is hard in the others too.

    Args:
        entries: Of every task and mode the one that decides.
        drawn: By task and mode, its score in each sample of a bootstrap.
    """
    modes = dict.fromkeys(entry.mode for entry in entries)
    means = []
    for kind, mode in product((SIMILARITY, RETRIEVAL), modes):
        found = [entry for entry in entries if (entry.kind, entry.mode) == (kind, mode)]
        if len(found) > 1:
            samples = [drawn[entry.task, entry.mode] for entry in found]
            means.append(_mean_entry(found, np.mean(samples, axis=0)))
    return means


def _mean_entry(found: Sequence[Entry], samples: np.ndarray) -> Entry:
    first = found[0]
    value, baseline = _mean(e.value for e in found), _mean(e.baseline for e in found)
    floor = _mean(entry.floor for entry in found)
    above = baseline is not None and baseline > floor
    given: dict[str, Any] = {
        "task": f"mean of {len(found)} {first.kind} tasks",
        "kind": first.kind,
        "mode": first.mode,
        "metric": first.metric,
        "main": True,
        "value": value,
        "baseline": baseline,
        "floor": floor,
        "floors": {name: _mean(e.floors[name] for e in found) for name in first.floors},
        "retention": value / baseline if baseline is not None and baseline > 0 else None,
        "retention_above_floor": (value - floor) / (baseline - floor) if above else None,
        "samples": sum(entry.samples for entry in found),
        "interval": list(interval_of(samples)),
    }
    if first.also:
        given["also"] = {name: _mean(entry.also[name] for entry in found) for name in first.also}
    return Entry(**given)


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or ``None`` if one of the values is."""
    known = list(values)
    return None if None in known else float(np.mean(known))
