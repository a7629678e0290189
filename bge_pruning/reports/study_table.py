"""A study as Markdown: what each method keeps, what it cost, and whether gates beat baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bge_pruning.reports.markdown import table
from bge_pruning.reports.study_summary import (
    Estimate,
    Group,
    Key,
    compare_groups,
    find_keys,
    floor_shares,
    group_cells,
    judge,
    kept_of,
)

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
