"""Curves of a training run: how the constraint was met, the losses and the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bge_pruning.reports.report_data import (
    Series,
    logged_scores,
    pruned_axes,
    running_quantiles,
    task_losses,
    thin,
)
from bge_pruning.utils.visualization import (
    AXIS_TITLES,
    LIGHT,
    Theme,
    dress,
    legend_label,
    make_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MULTIPLIERS = {
    "lambda_1": "Multiplier of the gap (lambda_1)",
    "lambda_2": "Multiplier of its square (lambda_2)",
}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # once the colours are used up

Draw = Callable[["Axes"], None]


def draw_constraint(series: Series, theme: Theme = LIGHT) -> Figure:
    """Draw expected, target and realised sparsity of each axis that was pruned."""
    with theme.context():
        figure = _panels([partial(_draw_axis, axis, series, theme) for axis in pruned_axes(series)])
        by_name = {line.get_label(): line for panel in figure.axes for line in panel.lines}
        names = [name for name, _ in _sparsity_styles(theme).values() if name in by_name]
        figure.legend([by_name[name] for name in names], names, loc="outside lower center", ncols=3)
    return figure


def draw_multipliers(series: Series, theme: Theme = LIGHT) -> Figure:
    """Draw the multipliers that hold the gates to the constraint."""
    found = {title: _multipliers(name, series) for name, title in MULTIPLIERS.items()}
    with theme.context():
        return _panels([partial(_draw_lines, t, k, series, theme) for t, k in found.items() if k])


def _multipliers(name: str, series: Series) -> dict[str, str]:
    """Keys of one multiplier by the name of the axis."""
    keys = {axis: f"pruning/{name}/{axis}" for axis in pruned_axes(series)}
    return {AXIS_TITLES.get(axis, axis): key for axis, key in keys.items() if key in series}


def has_multipliers(series: Series) -> bool:
    """Whether :func:`draw_multipliers` has something to draw."""
    return any(_multipliers(name, series) for name in MULTIPLIERS)


def draw_training(series: Series, theme: Theme = LIGHT) -> Figure:
    """Draw the parts of the task loss and the scores while training, as far as they were logged."""
    losses, scores = task_losses(series), logged_scores(series)
    draws: list[Draw] = []
    if losses:
        draws.append(partial(_draw_losses, losses, series, theme))
    if scores:
        draws.append(partial(_draw_lines, "Scores while training", scores, series, theme))
    with theme.context():
        return _panels(draws)


def has_training(series: Series) -> bool:
    """Whether :func:`draw_training` has something to draw."""
    return bool(task_losses(series) or logged_scores(series))


def _panels(draws: Sequence[Draw]) -> Figure:
    """A figure with a panel for each function, in rows."""
    columns = {4: 2}.get(len(draws), min(3, len(draws)))
    rows = -(-len(draws) // columns)
    width = {1: 6.0, 2: 5.0}.get(columns, 3.4)
    figure = make_figure(width * columns, 2.8 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, draw in zip(panels, draws, strict=False):
        draw(panel)
        panel.set_xlabel("training batch")
        panel.locator_params(axis="x", nbins=5, integer=True)
    for panel in panels[len(draws) :]:
        panel.remove()
    return figure


def _sparsity_styles(theme: Theme) -> dict[str, tuple[str, dict[str, object]]]:
    """Name and look of each curve; the last one lies on top."""
    realised = {"color": theme.series[1], "linewidth": 1.6, "linestyle": (0, (1, 1.5))}
    target = {"color": theme.muted, "linewidth": 1.4, "linestyle": (0, (5, 2))}
    return {
        "realised": ("what a cut would remove", realised),
        "target": ("target", target),
        "expected": ("expected by the gates", {"color": theme.series[0], "linewidth": 1.9}),
    }


def _draw_axis(axis: str, series: Series, theme: Theme, panel: Axes) -> None:
    for name, (label, style) in _sparsity_styles(theme).items():
        batches, values = thin(*series.get(f"pruning/{name}_sparsity/{axis}", ([], [])))
        if values:
            panel.plot(batches, [100 * value for value in values], label=label, **style)
    bottom, top = panel.get_ylim()
    panel.set_ylim(min(0, bottom), max(5, 1.08 * top))
    dress(panel, f"Removed {AXIS_TITLES.get(axis, axis)} (%)")


def _draw_lines(
    title: str, keys: dict[str, str], series: Series, theme: Theme, panel: Axes
) -> None:
    """Draw curves by name; few points get a marker each."""
    for index, (name, key) in enumerate(keys.items()):
        batches, values = thin(*series[key])
        marker = {"marker": "o", "markersize": 3} if len(values) <= 30 else {}
        panel.plot(batches, values, label=legend_label(name), **_style(index, theme), **marker)
    panel.margins(y=0.12)
    _legend_below(panel, len(keys))
    dress(panel, title)


def _draw_losses(keys: Sequence[str], series: Series, theme: Theme, panel: Axes) -> None:
    """Draw each loss as a running median in the band of most of its values."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for index, key in enumerate(keys):
        batches, values = series[key]
        places, quantiles = running_quantiles(values)
        at = [batches[place] for place in places]
        low, middle, high = zip(*quantiles, strict=True)
        style = _style(index, theme)
        panel.fill_between(at, low, high, color=style["color"], alpha=0.18, linewidth=0)
        name = key.removeprefix("loss/train/").replace("_", " ")
        panel.plot(at, middle, label=legend_label(name), **style)
    everything = [value for key in keys for value in series[key][1]]
    if min(everything) > 0 and max(everything) > 30 * min(everything):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter("")
    _legend_below(panel, len(keys))
    dress(panel, "Task loss: median and most values")


def _style(index: int, theme: Theme) -> dict[str, object]:
    colours = len(theme.series)
    dashes = DASHES[index // colours % len(DASHES)]
    return {"color": theme.series[index % colours], "linewidth": 1.6, "linestyle": dashes}


def _legend_below(panel: Axes, count: int) -> None:
    """Put the legend where it hides no curve."""
    look = {"loc": "upper center", "columnspacing": 1, "handlelength": 1.8}
    panel.legend(**look, bbox_to_anchor=(0.5, -0.22), ncols=1 if count == 1 else 2)
