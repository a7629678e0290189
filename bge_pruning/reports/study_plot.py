"""A study as a picture: quality kept against the encoder's parameters, for each method.

Where all models are of one size, parameters say nothing: they are rows then, named by what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bge_pruning.reports.study_summary import (
    Group,
    Key,
    find_keys,
    floor_shares,
    group_cells,
    kept_of,
    keys_by_kind,
)
from bge_pruning.utils.visualization import (
    LIGHT,
    ORANGE,
    SKY,
    Theme,
    dress,
    legend_label,
    make_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT = "kept of the original's score (%)"
TITLES = {"all": "All tasks and modes", "similarity": "Similarity", "retrieval": "Retrieval"}
MARKERS = ("o", "s", "^", "v", "P", "X", "D")
MEAN = {"markersize": 6, "linewidth": 1.3}
SEED = {"markersize": 3, "alpha": 0.4}
# From one method to the next, of the width of a panel.
STEP = 0.012
# Sizes whose parameters differ by less than this factor are one.
ALIKE = 1.02


def draw_study(
    cells: Sequence[dict[str, Any]], reference: Mapping[str, Any], theme: Theme = LIGHT
) -> Figure:
    """Draw a panel of all tasks, and one of each kind of task if there are several.

    A study of one size has a row for each of its models, any other a line for each method.

    Args:
        cells: See :func:`bge_pruning.utils.study_records.read_cells`.
        reference: See :func:`bge_pruning.utils.study_records.read_reference`.
        theme: Colours.

    Returns:
        The figure: means over seeds as lines, and every seed as a dot. Of two or three seeds, the
        intervals are in the table: drawn, they would press all else together.
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
            panel.set_xlabel(KEPT if in_rows else "parameters of the encoder (millions)")
            _draw_floor(panel, floors, keys, lowest, theme, upright=in_rows)
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
        if kept := _percents(group, keys):
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


def _percents(group: Group, keys: Sequence[Key]) -> list[float]:
    """What each seed keeps, of those that have all scores."""
    kept = [kept_of(cell, keys) for cell in group.cells]
    return [100 * value for value in kept if value is not None]


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
            kept = _percents(group, keys)
            if group.method != method or not kept:
                continue
            means.append((_millions(group) + aside, fmean(kept)))
            panel.plot([means[-1][0]] * len(kept), kept, **look, linestyle="", **SEED)
            lowest = min(lowest, *kept)
        if means:
            panel.plot(
                *zip(*sorted(means), strict=True), **look, **MEAN, label=legend_label(method)
            )
    return lowest


def _millions(group: Group) -> float:
    return group.cells[0]["parameters"]["encoder"] / 1e6


def _draw_floor(
    panel: Axes,
    floors: Mapping[Key, float],
    keys: Sequence[Key],
    lowest: float,
    theme: Theme,
    upright: bool,
) -> None:
    """Draw the floor as a line, or say where it is: far below, it would press all else together."""
    values = [floors[key] for key in keys if key in floors]
    if not values:
        return
    mean = 100 * sum(values) / len(values)
    if lowest - mean < 3 * (100 - lowest):
        line = panel.axvline if upright else panel.axhline
        line(mean, color=theme.muted, linestyle="--", linewidth=1.2, label="floor")
        return
    text = f"floor: {mean:.0f} %, far below"
    if upright:  # any place inside may have a dot
        panel.set_xlabel(f"{panel.get_xlabel()}\n{text}")
        return
    panel.text(
        0.98, 0.02, text,
        color=theme.muted, transform=panel.transAxes, fontsize="small", ha="right",
    )  # fmt: skip
