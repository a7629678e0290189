"""Write comparisons and studies: JSON, tables and a picture of quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from bge_pruning.reports.comparison import (
    ORIGINAL,
    Candidate,
    Comparison,
    Estimate,
    Key,
    describe_left_out,
    estimate_mean,
    pareto_front,
    read_candidates,
    span,
    summary_header,
    summary_rows,
)
from bge_pruning.reports.markdown import table
from bge_pruning.reports.study_records import StudyCell, StudyReference, read_cells, read_reference
from bge_pruning.reports.study_summary import (
    Group,
    find_keys,
    floor_shares,
    group_cells,
    keys_by_kind,
    render_study,
)
from bge_pruning.utils.files import lock_of, refuse_existing, write_json, write_text
from bge_pruning.utils.visualization import (
    BLUE,
    LIGHT,
    ORANGE,
    SKY,
    Theme,
    dress,
    legend_label,
    make_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = "pareto.png"
COMPARISON_FILES = ("comparison.json", "comparison.md", PICTURE)
STUDY_TABLE, STUDY_SUMMARY = "table.md", "summary.json"
KEPT = "kept of the original's score (%)"
PARAMETERS = "parameters of the encoder (millions)"
TITLES = {"all": "All tasks and modes", "similarity": "Similarity", "retrieval": "Retrieval"}
MARKERS = ("o", "s", "^", "v", "P", "X", "D")
MEAN = {"markersize": 6, "linewidth": 1.3}
SEED = {"markersize": 3, "alpha": 0.4}
STEP = 0.012  # distance between two methods at one size, as a share of the panel's width
ALIKE = 1.02  # models whose parameters differ by less than this factor are of one size


def write_comparison(results: Sequence[str], output: Path, overwrite: bool = False) -> Comparison:
    """Compare evaluated models, see :func:`read_candidates`, and write the result into a folder."""
    data, text, picture = (output / name for name in COMPARISON_FILES)
    refuse_existing([data, text, picture], overwrite=overwrite)
    found = read_candidates(results)
    write_json(describe_comparison(found), data, overwrite=overwrite)
    write_text(text, f"{render_comparison(found)}\n![Pareto plot]({PICTURE})\n")
    save_figure(draw_comparison(found.candidates), picture)
    return found


def describe_comparison(found: Comparison) -> dict[str, object]:
    """The content of ``comparison.json``."""
    candidates, keys, left_out = found
    described = [
        {
            "name": c.name,
            "kept": c.kept,
            "floor": c.floor,
            "scores": [c.scores[key] for key in keys],
            "parameters": {"encoder": c.encoder, "total": c.total},
            "latency_ratio": c.latency and c.latency.value,
            "latency_quartiles": c.latency and c.latency.quartiles,
            "throughput_ratio": c.throughput and c.throughput.value,
            "throughput_quartiles": c.throughput and c.throughput.quartiles,
        }
        for c in candidates
    ]
    return {
        "tasks": [{"task": task, "mode": mode} for task, mode in keys],
        "left_out": [
            {"task": task, "mode": mode, "not_in": names}
            for (task, mode), names in left_out.items()
        ],
        "candidates": described,
    }


def render_comparison(found: Comparison) -> str:
    """A Markdown page: a table of costs and shares kept, and a table of every score."""
    candidates, keys, left_out = found
    titles = [f"{task}, {mode}" for task, mode in keys]
    scores = [[c.name, *(span(c.scores[key], ".4f") for key in keys)] for c in candidates]
    parts = [
        "# Comparison",
        "Kept is the mean over tasks and modes of score / original's score, floor the same of the "
        "larger floor (random weights, words alone). Time and texts per second are in times of "
        "the original's, measured in turns in one process, in brackets the quartiles. Of several "
        "runs with one name the mean is given (of speeds the median), and in brackets the lowest "
        "and the highest.",
        table(summary_header(), summary_rows(candidates)),
        table(["model", *titles], scores),
        *describe_left_out(left_out),
    ]
    return "\n\n".join(parts) + "\n"


def write_study_report(folder: Path) -> Path:
    """Write ``table.md``, ``pareto.png`` and ``summary.json`` beside the cells of a study.

    An earlier report is replaced. Returns the path of the table.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. To fix, run the study first.")
    target = folder / STUDY_TABLE
    with lock_of(target):  # several processes may end at once, and the last one has all cells
        cells, reference = read_cells(folder), read_reference(folder)
        if not find_keys(cells):
            raise ValueError(
                f"{folder / 'cells'}: the cells have no task in common. To fix, keep the results "
                f"of each study in a folder of its own."
            )
        save_figure(draw_study(cells, reference), folder / PICTURE)
        write_json(summarise(cells, reference), folder / STUDY_SUMMARY, overwrite=True)
        text = render_study(cells, reference)
        write_text(target, f"{text}\n![Quality kept against size]({PICTURE})\n")
    return target


def summarise(cells: Sequence[StudyCell], reference: StudyReference) -> dict[str, object]:
    """The numbers of the table and the picture, by ``TASK, MODE`` and their ``mean``."""
    keys, floors = find_keys(cells), floor_shares(reference)
    named = {"mean": keys, **{f"{task}, {mode}": [(task, mode)] for task, mode in keys}}
    groups = [
        {
            "size": group.size,
            "method": group.method,
            "learned": group.learned,
            "seeds": [cell.seed for cell in group.cells],
            "encoder_share": group.cells[0].encoder_share,
            "encoder": group.cells[0].parameters.encoder,
            "kept": {name: _describe(estimate_mean(group.kept(k))) for name, k in named.items()},
        }
        for group in group_cells(cells)
    ]
    known = {name: [floors[k] for k in part if k in floors] for name, part in named.items()}
    floor = {name: fmean(values) for name, values in known.items() if values}
    return {"groups": groups, "floor": floor, "original": reference.original}


def _describe(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {"mean": estimate.mean, "half_interval": estimate.half}


def draw_comparison(candidates: Sequence[Candidate]) -> Figure:
    """Draw what each model keeps against its parameters, and against its time if it was measured.

    Points that no other one beats are joined. Several runs of a model have a bar from the lowest
    to the highest.
    """
    timed = [c for c in candidates if c.latency is not None]
    panels = 2 if len(timed) > 1 else 1
    with LIGHT.context():
        figure = make_figure(5.2 * panels + 0.4, 4.2)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_candidates(axes[0], candidates, [c.encoder / 1e6 for c in candidates])
        axes[0].set_xlabel(PARAMETERS)
        dress(axes[0], "Quality kept against size")
        if panels == 2:
            _draw_candidates(axes[1], timed, [100 * c.latency.value for c in timed])
            axes[1].set_xlabel("time of one text (% of the original's)")
            dress(axes[1], "Quality kept against measured time")
        axes[0].set_ylabel(KEPT)
    return figure


def _draw_candidates(panel: Axes, candidates: Sequence[Candidate], costs: Sequence[float]) -> None:
    kept = [100 * fmean(c.kept) for c in candidates]
    front = pareto_front(costs, kept)
    line = {"color": BLUE, "linewidth": 1.3, "alpha": 0.6, "zorder": 1}
    panel.step([costs[i] for i in front], [kept[i] for i in front], where="post", **line)
    for index, (candidate, cost, quality) in enumerate(zip(candidates, costs, kept, strict=True)):
        low, high = 100 * min(candidate.kept), 100 * max(candidate.kept)
        colour = LIGHT.muted if candidate.name == ORIGINAL or index not in front else BLUE
        look = {"marker": "D" if candidate.name == ORIGINAL else "o", "color": colour, "capsize": 3}
        bars = [[quality - low], [high - quality]]
        panel.errorbar(cost, quality, yerr=bars, markersize=7, zorder=2, **look)
        place = {"xytext": (6, -11), "textcoords": "offset points"}
        panel.annotate(candidate.name, (cost, quality), fontsize=8, **place)
    panel.margins(x=0.18, y=0.15)


def draw_study(
    cells: Sequence[StudyCell], reference: StudyReference, theme: Theme = LIGHT
) -> Figure:
    """Draw a panel of all tasks, and one of each kind of task if there are several.

    A study of one size, where parameters say nothing, has a row for each of its models; any other
    has a line for each method. Means over seeds are lines and seeds are dots. The intervals of two
    or three seeds are in the table alone: drawn, they would press everything else together.
    """
    groups, floors = group_cells(cells), floor_shares(reference)
    parts = keys_by_kind(cells, find_keys(cells))
    sizes = [_millions(group) for group in groups]
    in_rows = max(sizes) < ALIKE * min(sizes)
    height = 1.5 + 0.3 * len(groups) if in_rows else 4.4
    with theme.context():
        figure = make_figure(4.2 * len(parts) + 0.6, height)
        panels = figure.subplots(1, len(parts), squeeze=False, sharey=in_rows)[0]
        for panel, (kind, keys) in zip(panels, parts.items(), strict=True):
            draw = _draw_rows if in_rows else _draw_methods
            lowest = draw(panel, groups, keys, theme)
            dress(panel, TITLES[kind], grid="both" if in_rows else "y")
            panel.set_xlabel(KEPT if in_rows else PARAMETERS)
            if values := [floors[key] for key in keys if key in floors]:
                _draw_floor(panel, 100 * fmean(values), lowest, theme, upright=in_rows)
        if in_rows:
            panels[0].set_ylim(len(groups) - 0.5, -0.5)  # shared; the first group is above
        else:
            panels[0].set_ylabel(KEPT)
        named = {line.get_label(): line for panel in panels for line in panel.lines}
        named = {label: line for label, line in named.items() if not label.startswith("_")}
        if named:
            look = {"loc": "outside lower center", "ncols": min(4, len(named))}
            figure.legend(list(named.values()), list(named), **look)
    return figure


def _draw_rows(panel: Axes, groups: Sequence[Group], keys: Sequence[Key], theme: Theme) -> float:
    """Draw what each group keeps in a row of its own; the least of it in percent is returned."""
    look = {"color": theme.series[0], "marker": MARKERS[0], "linestyle": ""}
    lowest = 100.0
    for row, group in enumerate(groups):
        if kept := [100 * share for share in group.kept(keys)]:
            panel.plot(kept, [row] * len(kept), **look, **SEED)
            panel.plot([fmean(kept)], [row], **{**MEAN, **look})
            lowest = min(lowest, *kept)
    panel.set_yticks(range(len(groups)), _names(groups))
    return lowest


def _names(groups: Sequence[Group]) -> list[str]:
    """Names of the groups by what differs between them."""
    methods, sizes = {group.method for group in groups}, {group.size for group in groups}
    if len(sizes) == 1:
        return [group.method for group in groups]
    if len(methods) == 1:
        return [group.size for group in groups]
    return [f"{group.method}, {group.size}" for group in groups]


def _draw_methods(panel: Axes, groups: Sequence[Group], keys: Sequence[Key], theme: Theme) -> float:
    """Draw what each method keeps; the least of it in percent is returned."""
    methods = list(dict.fromkeys(group.method for group in groups))
    sizes = [_millions(group) for group in groups]
    step = STEP * (max(sizes) - min(sizes))
    colours = [*theme.series, SKY, ORANGE]
    lowest = 100.0
    for number, method in enumerate(methods):
        look = {"color": colours[number % len(colours)], "marker": MARKERS[number % len(MARKERS)]}
        # Beside each other, for most have the same sizes.
        aside = step * (number - (len(methods) - 1) / 2)
        means = []
        for group in groups:
            kept = [100 * share for share in group.kept(keys)]
            if group.method != method or not kept:
                continue
            means.append((_millions(group) + aside, fmean(kept)))
            panel.plot([means[-1][0]] * len(kept), kept, **look, linestyle="", **SEED)
            lowest = min(lowest, *kept)
        if means:
            look |= MEAN
            panel.plot(*zip(*sorted(means), strict=True), **look, label=legend_label(method))
    return lowest


def _millions(group: Group) -> float:
    return group.cells[0].parameters.encoder / 1e6


def _draw_floor(panel: Axes, mean: float, lowest: float, theme: Theme, upright: bool) -> None:
    """Draw the floor as a line, or say where it is: far below, it would press all else together."""
    if lowest - mean < 3 * (100 - lowest):
        line = panel.axvline if upright else panel.axhline
        line(mean, color=theme.muted, linestyle="--", linewidth=1.2, label="floor")
        return
    text = f"floor: {mean:.0f} %, far below"
    if upright:  # any place inside may have a dot
        panel.set_xlabel(f"{panel.get_xlabel()}\n{text}")
        return
    look = {"color": theme.muted, "fontsize": "small", "ha": "right"}
    panel.text(0.98, 0.02, text, transform=panel.transAxes, **look)
