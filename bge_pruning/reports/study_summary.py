"""A study: models of several methods and sizes, the shares that they keep, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from bge_pruning.reports.comparison import (
    Estimate,
    Key,
    by_key,
    common_keys,
    estimate_mean,
    percent,
)
from bge_pruning.reports.markdown import Block, table
from bge_pruning.reports.study_records import StudyCell, StudyReference


@dataclass(frozen=True)
class Group:
    """The cells of one method at one size, by seed."""

    method: str
    size: str
    cells: list[StudyCell]

    @property
    def learned(self) -> bool:
        """Whether gates were trained; otherwise the method is a baseline."""
        return self.cells[0].config.get("method") == "l0"

    def kept(self, keys: Sequence[Key]) -> list[float]:
        """The mean share that each seed keeps, of the seeds that have all scores."""
        shares = [kept_of(cell, keys) for cell in self.cells]
        return [share for share in shares if share is not None]

    def estimate(self, value_of: Callable[[StudyCell], float | None]) -> Estimate | None:
        """Mean over seeds of a value of a cell; ``None`` if no cell has it."""
        values = [value_of(cell) for cell in self.cells]
        return estimate_mean([value for value in values if value is not None])


def group_cells(cells: Sequence[StudyCell]) -> list[Group]:
    """Cells by size, the largest first, and by method, those with gates first."""
    found: dict[tuple[str, str], list[StudyCell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        found.setdefault((cell.size, cell.method), []).append(cell)
    shares: dict[str, float] = {}
    for (size, _), part in found.items():
        shares[size] = max(shares.get(size, 0.0), part[0].encoder_share)
    groups = [Group(method, size, part) for (size, method), part in found.items()]
    return sorted(groups, key=lambda g: (-shares[g.size], g.size, not g.learned, g.method))


def find_keys(cells: Sequence[StudyCell]) -> list[Key]:
    """The tasks and modes that every cell was judged by, in the order of the first one."""
    return common_keys([by_key(cell.scores) for cell in cells])


def kept_of(cell: StudyCell, keys: Sequence[Key]) -> float | None:
    """Mean share of the original's score that a cell keeps; ``None`` if one is unknown."""
    scores = by_key(cell.scores)
    values = [scores[key].retention for key in keys]
    return fmean(values) if values and None not in values else None


def floor_shares(reference: StudyReference) -> dict[Key, float]:
    """The share of the original's score that the better floor reaches, by task and mode."""
    words, random = map(by_key, (reference.scores.word_embeddings, reference.scores.random_weights))
    return {
        key: max(words[key].value, random[key].value) / original.value
        for key, original in by_key(reference.scores.original).items()
        if original.value > 0
    }


def keys_by_kind(cells: Sequence[StudyCell], keys: Sequence[Key]) -> dict[str, list[Key]]:
    """The tasks and modes of each kind of task, and all of them first, under ``all``."""
    kinds = {key: score.kind for key, score in by_key(cells[0].scores).items()}
    by_kind: dict[str, list[Key]] = {}
    for key in keys:
        by_kind.setdefault(kinds[key], []).append(key)
    return {"all": list(keys), **(by_kind if len(by_kind) > 1 else {})}


def compare_groups(ours: Group, theirs: Group, keys: Sequence[Key]) -> Estimate | None:
    """Mean over common seeds of the share that ours keeps above theirs; ``None`` without any."""
    other = {cell.seed: kept_of(cell, keys) for cell in theirs.cells}
    pairs = [(kept_of(c, keys), other.get(c.seed)) for c in ours.cells]
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


def render_study(cells: Sequence[StudyCell], reference: StudyReference) -> str:
    """The tables of a study, with headings of the second level."""
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


def _kept_table(groups: Sequence[Group], keys: Sequence[Key], reference: StudyReference) -> Block:
    header = ["size", "method", "encoder", "seeds", "mean", *(f"{t}, {m}" for t, m in keys)]
    rows = [["original", "", "100.0 %", "", *["100.0"] * (len(keys) + 1)]]
    for group in groups:
        share = f"{100 * group.cells[0].encoder_share:.1f} %"
        estimates = [estimate_mean(group.kept(part)) for part in (keys, *([key] for key in keys))]
        names = [group.size, group.method, share, len(group.cells)]
        rows.append([*names, *map(percent, estimates)])
    floors = floor_shares(reference)
    if all(key in floors for key in keys):
        values = [floors[key] for key in keys]
        rows.append(["floor", "", "", "", *(f"{100 * v:.1f}" for v in (fmean(values), *values))])
    return table(header, rows, words=2)


def _against_baselines(groups: Sequence[Group], keys: Sequence[Key]) -> list[str]:
    """Each method with gates against each baseline of its size; nothing without a pair."""
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


def _cost_table(groups: Sequence[Group]) -> Block:
    header = ["size", "method", "steps", "tokens", "minutes", "distance", "gap", "lost"]
    rows = []
    for group in groups:
        steps = sum(group.cells[0].steps.values())
        tokens = group.estimate(lambda cell: float(sum(cell.tokens.values())))
        distance = group.estimate(lambda cell: cell.gates and cell.gates.distance["all"])
        gap = group.estimate(lambda cell: cell.gates and cell.gates.gap["encoder"])
        costs = [f"{steps:,}", f"{tokens.mean / 1e6:.2f}M", _minutes(group.cells)]
        cut = ["-" if distance is None else f"{distance.mean:.4f}", percent(gap, 2)]
        cut.append(percent(group.estimate(_lost), 2))
        rows.append([group.size, group.method, *costs, *cut])
    return table(header, rows, words=2)


def _minutes(cells: Sequence[StudyCell]) -> str:
    """Mean over the cells of each machine, which is named after its GPU, or else its CPU."""
    by_machine: dict[str, list[float]] = {}
    for cell in cells:
        minutes = sum(seconds or 0.0 for seconds in cell.seconds.values()) / 60
        by_machine.setdefault(cell.machine.gpu or cell.machine.cpu, []).append(minutes)
    return ", ".join(f"{fmean(values):.1f} on {name}" for name, values in by_machine.items())


def _lost(cell: StudyCell) -> float | None:
    return fmean(task.lost for task in cell.cut.values()) if cell.cut else None
