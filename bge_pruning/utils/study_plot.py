"""A study as a picture: quality kept against the encoder's parameters, for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bge_pruning.utils.figures import LIGHT, ORANGE, SKY, Theme, dress, legend_label, make_figure
from bge_pruning.utils.study_summary import (
    Group,
    Key,
    find_keys,
    floor_shares,
    group_cells,
    kept_of,
    keys_by_kind,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {"all": "All tasks and modes", "similarity": "Similarity", "retrieval": "Retrieval"}
MARKERS = ("o", "s", "^", "v", "P", "X", "D")
MEAN = {"markersize": 6, "linewidth": 1.3}
SEED = {"markersize": 3, "alpha": 0.4}
# From one method to the next, of the width of a panel.
STEP = 0.012


def draw_study(
    cells: Sequence[dict[str, Any]], reference: Mapping[str, Any], theme: Theme = LIGHT
) -> Figure:
    """Draw a panel of all tasks, and one of each kind of task if there are several.

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
    with theme.context():
        figure = make_figure(4.2 * len(parts) + 0.6, 4.4)
        panels = figure.subplots(1, len(parts), squeeze=False)[0]
        for panel, (kind, keys) in zip(panels, parts.items(), strict=True):
            lowest = _draw_methods(panel, groups, keys, theme)
            _draw_floor(panel, floors, keys, lowest, theme)
            panel.set_xlabel("parameters of the encoder (millions)")
            dress(panel, TITLES[kind])
        panels[0].set_ylabel("kept of the original's score (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


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
            kept = [kept_of(cell, keys) for cell in group.cells]
            kept = [100 * value for value in kept if value is not None]
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
    panel: Axes, floors: Mapping[Key, float], keys: Sequence[Key], lowest: float, theme: Theme
) -> None:
    """Draw the floor as a line, or say where it is: far below, it would press all else together."""
    values = [floors[key] for key in keys if key in floors]
    if not values:
        return
    mean = 100 * sum(values) / len(values)
    if lowest - mean < 3 * (100 - lowest):
        panel.axhline(mean, color=theme.muted, linestyle="--", linewidth=1.2, label="floor")
        return
    panel.text(
        0.98, 0.02, f"floor: {mean:.0f} %, far below",
        color=theme.muted, transform=panel.transAxes, fontsize="small", ha="right",
    )  # fmt: skip
