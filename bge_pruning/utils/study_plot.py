"""A study as a picture: quality kept against the encoder's parameters, for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def draw_study(
    cells: Sequence[dict[str, Any]], reference: Mapping[str, Any], theme: Theme = LIGHT
) -> Figure:
    """Draw a panel of all tasks, and one of each kind of task if there are several.

    Args:
        cells: See :func:`bge_pruning.utils.study_records.read_cells`.
        reference: See :func:`bge_pruning.utils.study_records.read_reference`.
        theme: Colours.

    Returns:
        The figure. Bars are 95 % intervals over seeds.
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
    colours = [*theme.series, SKY, ORANGE]
    lowest = 100.0
    for number, method in enumerate(methods):
        points = []
        for group in groups:
            found = group.estimate(kept_of(cell, keys) for cell in group.cells)
            if group.method == method and found is not None:
                size = group.cells[0]["parameters"]["encoder"] / 1e6
                points.append((size, 100 * found.mean, 100 * (found.half or 0.0)))
        if not points:
            continue
        sizes, kept, halves = zip(*sorted(points), strict=True)
        lowest = min(lowest, *kept)
        panel.errorbar(
            sizes, kept, yerr=halves,
            label=legend_label(method), color=colours[number % len(colours)],
            marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.3, capsize=3,
        )  # fmt: skip
    return lowest


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
        0.02, 0.02, f"floor: {mean:.0f} %, far below",
        color=theme.muted, transform=panel.transAxes, fontsize="small",
    )  # fmt: skip
