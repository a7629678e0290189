"""Several models of a study beside each other: scores kept, intervals, and their table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from bge_pruning.reports.markdown import table

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


INTERVAL = (
    "Means over seeds; after ± is half of the 95 % interval of the mean by Student's t over seeds, "
    "which is not there for a single seed."
)


def render_study(cells: Sequence[dict[str, Any]], reference: Mapping[str, Any]) -> str:
    """The tables of a study, with headings of the second level.

    Args:
        cells: See :func:`bge_pruning.utils.study_records.read_cells`.
        reference: See :func:`bge_pruning.utils.study_records.read_reference`.
    """
    groups, keys = group_cells(cells), find_keys(cells)
    parts = [
        "## What is kept",
        f"Percent of the original's score. The mean is over all tasks and modes. {INTERVAL}",
        _kept_table(groups, keys, reference),
        *_against_baselines(groups, keys),
        "## The cut and the cost",
        "Distance: mean over the gates of the distance of the open probability to 0 or 1, before "
        "the cut. Gap: expected minus target sparsity of the encoder before the cut, in points. "
        "Lost: Spearman (dense, in points) that the cut costs before recovery, against the model "
        "with all gates at their median, and for a baseline against the original. Minutes: of the "
        "choice, the trainings and the evaluation, by the machine; several processes may have "
        "shared it.",
        _cost_table(groups),
    ]
    return "\n\n".join(parts) + "\n"


def percent(estimate: Estimate | None, digits: int = 1) -> str:
    """An estimate of a share in percent, ``-`` if there is none."""
    if estimate is None:
        return "-"
    text = f"{100 * estimate.mean:.{digits}f}"
    return text if estimate.half is None else f"{text} ± {100 * estimate.half:.{digits}f}"


def _kept_table(groups: Sequence[Group], keys: Sequence[Key], reference: Mapping[str, Any]) -> str:
    header = ["size", "method", "encoder", "seeds", "mean", *(f"{t}, {m}" for t, m in keys)]
    rows = [["original", "", "100.0 %", "", *["100.0"] * (len(keys) + 1)]]
    for group in groups:
        share = group.cells[0]["encoder_share"]
        cells = [group.size, group.method, f"{100 * share:.1f} %", len(group.cells)]
        for wanted in ([*keys], *([key] for key in keys)):
            cells.append(percent(group.estimate(kept_of(c, wanted) for c in group.cells)))
        rows.append(cells)
    floors = floor_shares(reference)
    if all(key in floors for key in keys):
        values = [floors[key] for key in keys]
        texts = [f"{100 * value:.1f}" for value in (sum(values) / len(values), *values)]
        rows.append(["floor", "", "", "", *texts])
    return table(header, rows, words=2)


def _against_baselines(groups: Sequence[Group], keys: Sequence[Key]) -> list[str]:
    modes = list(dict.fromkeys(mode for _, mode in keys))
    parts = [[key for key in keys if key[1] == mode] for mode in modes] if len(modes) > 1 else []
    rows = []
    for ours in groups:
        for theirs in groups:
            if theirs.size != ours.size or theirs.learned or not ours.learned:
                continue
            found = [compare_groups(ours, theirs, part) for part in (keys, *parts)]
            if found[0] is not None:
                names = [ours.size, ours.method, theirs.method, judge(found[0])]
                rows.append([*names, found[0].count, *(percent(part, 2) for part in found)])
    if not rows:
        return []
    header = ["size", "method", "baseline", "the method is", "common seeds", "points more"]
    return [
        "## Against the baselines",
        "Difference of the mean share kept, in points, paired by seed: over all tasks and modes, "
        f"of which the verdict is, and over the tasks in each mode. {INTERVAL}",
        table([*header, *(f"{mode} alone" for mode in modes if parts)], rows, words=4),
    ]


def _cost_table(groups: Sequence[Group]) -> str:
    header = ["size", "method", "steps", "tokens", "minutes", "distance", "gap", "lost"]
    rows = []
    for group in groups:
        cells = group.cells
        tokens = group.estimate(float(sum(c["tokens"].values())) for c in cells)
        rows.append(
            [
                *(group.size, group.method, f"{sum(cells[0]['steps'].values()):,}"),
                *(f"{tokens.mean / 1e6:.2f}M", _minutes(cells)),
                _plain(group.estimate(_gate(c, "distance", "all") for c in cells)),
                percent(group.estimate(_gate(c, "gap", "encoder") for c in cells), 2),
                percent(group.estimate(_lost(c) for c in cells), 2),
            ]
        )
    return table(header, rows, words=2)


def _minutes(cells: Sequence[Mapping[str, Any]]) -> str:
    """Mean of the cells of each machine, which is called by what computes."""
    by_machine: dict[str, list[float]] = {}
    for cell in cells:
        minutes = sum(seconds or 0.0 for seconds in cell["seconds"].values()) / 60
        name = cell["machine"]["gpu"] or cell["machine"]["cpu"]
        by_machine.setdefault(name, []).append(minutes)
    return ", ".join(f"{fmean(values):.1f} on {name}" for name, values in by_machine.items())


def _plain(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.mean:.4f}"


def _gate(cell: Mapping[str, Any], part: str, name: str) -> float | None:
    return None if cell["gates"] is None else cell["gates"][part][name]


def _lost(cell: Mapping[str, Any]) -> float | None:
    values = [task["lost"] for task in cell["cut"].values()]
    return sum(values) / len(values) if values else None
