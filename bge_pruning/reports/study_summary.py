"""Finished cells of a study as numbers: means over seeds with intervals, and who beats whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

CONFIDENCE = 0.95
# A task in a mode.
Key = tuple[str, str]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        half: Half the width of its 95 % interval by Student's t; ``None`` of a single seed.
        count: Seeds.
    """

    mean: float
    half: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """The cells of one method at one size.

    Attributes:
        method: Its name in the study.
        size: Name of the size.
        cells: One for each seed, by seed.
    """

    method: str
    size: str
    cells: list[dict[str, Any]]

    @property
    def learned(self) -> bool:
        """Whether gates were trained; else it is a baseline."""
        return self.cells[0]["config"].get("method") == "l0"

    def estimate(self, values: Iterable[float | None]) -> Estimate | None:
        """Mean of one value a cell, those that are ``None`` left out; ``None`` if all are."""
        return estimate_mean([value for value in values if value is not None])


def estimate_mean(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval ``mean +- t(0.975, n - 1) s / sqrt(n)``; ``None`` without values.

    The interval is over seeds: it says how far another choice of seeds may lead, not another
    choice of queries.

    Args:
        values: One for each seed.
    """
    count = len(values)
    if count < 2:
        return Estimate(values[0], None, 1) if values else None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(fmean(values), quantile * stdev(values) / count**0.5, count)


def group_cells(cells: Sequence[dict[str, Any]]) -> list[Group]:
    """Cells by size, the largest first, and by method, those with gates first.

    Args:
        cells: See :func:`bge_pruning.utils.study_records.read_cells`.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        found.setdefault((cell["size"], cell["method"]), []).append(cell)
    shares: dict[str, float] = {}
    for (size, _), part in found.items():
        shares[size] = max(shares.get(size, 0.0), part[0]["encoder_share"])
    groups = [Group(method, size, part) for (size, method), part in found.items()]
    return sorted(groups, key=lambda g: (-shares[g.size], g.size, not g.learned, g.method))


def find_keys(cells: Sequence[Mapping[str, Any]]) -> list[Key]:
    """The tasks and modes that every cell was judged by, in the order of the first one."""
    keys = [[(entry["task"], entry["mode"]) for entry in cell["scores"]] for cell in cells]
    return [key for key in keys[0] if all(key in other for other in keys)]


def kept_of(cell: Mapping[str, Any], keys: Iterable[Key]) -> float | None:
    """Mean over tasks and modes of the share of the original's score that a cell keeps.

    ``None`` if there is none, or the original's score is not above 0.

    Args:
        cell: The cell.
        keys: Which tasks and modes.
    """
    shares = {(entry["task"], entry["mode"]): entry["retention"] for entry in cell["scores"]}
    values = [shares[key] for key in keys]
    return fmean(values) if values and None not in values else None


def floor_shares(reference: Mapping[str, Any]) -> dict[Key, float]:
    """What the better floor keeps of the original's score, by task and mode.

    Args:
        reference: See :func:`bge_pruning.utils.study_records.read_reference`.
    """
    scores = {
        name: {(entry["task"], entry["mode"]): entry["value"] for entry in entries}
        for name, entries in reference["scores"].items()
    }
    floors = [scores["word_embeddings"], scores["random_weights"]]
    return {
        key: max(floor[key] for floor in floors if key in floor) / original
        for key, original in scores["original"].items()
        if original > 0
    }


def keys_by_kind(cells: Sequence[Mapping[str, Any]], keys: Sequence[Key]) -> dict[str, list[Key]]:
    """The tasks and modes of each kind of task, and all of them first, under ``all``."""
    kinds = {(entry["task"], entry["mode"]): entry["kind"] for entry in cells[0]["scores"]}
    by_kind: dict[str, list[Key]] = {}
    for key in keys:
        by_kind.setdefault(kinds[key], []).append(key)
    return {"all": list(keys), **(by_kind if len(by_kind) > 1 else {})}


def compare_groups(ours: Group, theirs: Group, keys: Sequence[Key]) -> Estimate | None:
    """Mean over common seeds of what one group keeps above another; ``None`` without any.

    Args:
        ours: One method at a size.
        theirs: Another one.
        keys: Tasks and modes.
    """
    other = {cell["seed"]: kept_of(cell, keys) for cell in theirs.cells}
    pairs = [(kept_of(c, keys), other.get(c["seed"])) for c in ours.cells]
    return estimate_mean([a - b for a, b in pairs if a is not None and b is not None])


def judge(difference: Estimate) -> str:
    """Whether a difference is more than its interval."""
    if difference.half is None:
        return "one seed: not known"
    if abs(difference.mean) <= difference.half:
        return "a tie"
    return "above" if difference.mean > 0 else "below"
