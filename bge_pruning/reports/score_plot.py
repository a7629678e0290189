"""Scores as dots: the model with its interval, the original, and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bge_pruning.utils.records import METRIC_TITLES, Entry
from bge_pruning.utils.visualization import LIGHT, Theme, legend_label, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_HEIGHT = 0.3  # inches
MARKERS = ("s", "^", "v", "P", "X")


def draw_scores(scores: Sequence[Entry], theme: Theme = LIGHT) -> Figure:
    """Draw a row for each task and mode; there is at least one, and the figure grows with them."""
    with theme.context():
        figure = make_figure(8.6, 1.35 + ROW_HEIGHT * max(2, count_rows(scores)))
        panel = figure.subplots()
        fill_scores(panel, scores, theme)
        panel.set_title("Score by task and mode, with its 95 % interval")
    return figure


def count_rows(scores: Sequence[Entry]) -> int:
    """Rows that :func:`fill_scores` needs: a task of several modes has a heading."""
    groups = [len(list(group)) for _, group in groupby(scores, key=_group)]
    return sum(count + (count > 1) for count in groups)


def fill_scores(panel: Axes, scores: Sequence[Entry], theme: Theme) -> None:
    """Draw the rows with their names at the left and their numbers at the right, and the legend."""
    places, labels = _layout(scores)
    drawn = [place for place, _, heading in labels if not heading]
    across = panel.get_yaxis_transform()
    panel.hlines(drawn, 0, 1, color=theme.grid, linewidth=0.7, transform=across)
    panel.set_axisbelow(True)
    _draw_floors(panel, scores, places, theme)
    _draw_others(panel, scores, places, theme)
    _draw_model(panel, scores, places, theme)
    _label_rows(panel, labels)
    _print_numbers(panel, scores, places, theme)
    panel.set_ylim(max(places) + 0.6, -0.6)
    panel.spines["left"].set_visible(False)
    panel.margins(x=0.05)
    look = {"ncols": 4, "columnspacing": 1.2, "handletextpad": 0.4, "borderaxespad": 0}
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    panel.legend(**place, bbox_transform=_below_ticks(panel), **look)


def _below_ticks(panel: Axes) -> Any:
    """Axes coordinates, moved down by the height of the tick labels whatever the axes' height."""
    from matplotlib.transforms import ScaledTranslation

    return panel.transAxes + ScaledTranslation(0, -0.34, panel.figure.dpi_scale_trans)


def _group(entry: Entry) -> tuple[str, str]:
    return entry.task, METRIC_TITLES.get(entry.metric, "")


def _layout(scores: Sequence[Entry]) -> tuple[list[int], list[tuple[int, str, bool]]]:
    """Places of the scores from the top, and every label: place, text, whether it is a heading."""
    places, labels = [], []
    row = 0
    for (task, metric), group in groupby(scores, key=_group):
        entries = list(group)
        if len(entries) > 1:
            labels.append((row, f"{task}, {metric}", True))
            row += 1
        for entry in entries:
            name = entry.mode if len(entries) > 1 else f"{task}, {metric}, {entry.mode}"
            places.append(row)
            labels.append((row, name, False))
            row += 1
    return places, labels


def _label_rows(panel: Axes, labels: Sequence[tuple[int, str, bool]]) -> None:
    panel.set_yticks([place for place, _, _ in labels], [text for _, text, _ in labels])
    panel.tick_params(axis="y", length=0)
    for text, (_, _, heading) in zip(panel.get_yticklabels(), labels, strict=True):
        text.set_fontweight("bold" if heading else "normal")


def _draw_floors(panel: Axes, scores: Sequence[Entry], places: Sequence[int], theme: Theme) -> None:
    """Draw a bar for each floor: the score of a model that nobody trained."""
    look = {"marker": "|", "s": 110, "linewidths": 2.2, "color": theme.muted, "zorder": 2}
    panel.scatter([entry.floor for entry in scores], places, label="floor", **look)


def _draw_others(panel: Axes, scores: Sequence[Entry], places: Sequence[int], theme: Theme) -> None:
    rows = list(zip(scores, places, strict=True))
    # Hollow and on top: it stays visible around the dot of a model that is as good.
    look = {"facecolors": "none", "edgecolors": theme.ink, "linewidths": 1.4, "zorder": 6}
    _scatter(panel, [(e.baseline, p) for e, p in rows], marker="D", s=40, label="original", **look)
    colours = theme.series[1:]
    for index, name in enumerate(dict.fromkeys(name for entry in scores for name in entry.also)):
        points = [(entry.also.get(name), place) for entry, place in rows]
        look = {"marker": MARKERS[index % len(MARKERS)], "color": colours[index % len(colours)]}
        _scatter(panel, points, s=24, label=legend_label(name), zorder=3, **look)


def _scatter(panel: Axes, points: Sequence[tuple[float | None, int]], **look: Any) -> None:
    known = [point for point in points if point[0] is not None]
    if known:
        panel.scatter(*zip(*known, strict=True), **look)


def _draw_model(panel: Axes, scores: Sequence[Entry], places: Sequence[int], theme: Theme) -> None:
    values = [entry.value for entry in scores]
    lows, highs = zip(*(e.interval or (e.value, e.value) for e in scores), strict=True)
    colour = theme.series[0]
    panel.hlines(places, lows, highs, color=colour, linewidth=4.5, alpha=0.4, zorder=3)
    panel.scatter(values, places, s=46, color=colour, label="this model", zorder=5)


def _print_numbers(panel: Axes, scores: Sequence[Entry], places: list[int], theme: Theme) -> None:
    """Print score and retention in two columns, right of the axes."""
    columns = {"score": [f"{entry.value:.3f}" for entry in scores]}
    if any(entry.retention is not None for entry in scores):
        kept = [entry.retention for entry in scores]
        columns["kept"] = ["" if share is None else f"{share:.1%}" for share in kept]
    look = {"ha": "right", "va": "center", "fontsize": 8.5, "annotation_clip": False}
    look["textcoords"] = "offset points"
    for index, (title, texts) in enumerate(columns.items()):
        offset, at = 40 + 46 * index, "axes fraction"
        panel.annotate(title, (1, 1), (offset, 9), xycoords=at, color=theme.muted, **look)
        for text, place in zip(texts, places, strict=True):
            at = panel.get_yaxis_transform()
            panel.annotate(text, (1, place), (offset, 0), xycoords=at, **look)
