"""Pictures of a pruning run: the gates, how sparsity approached its target, and what came out.

Every function draws on a ``Figure`` of its own, so neither the global backend nor ``pyplot`` is
touched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.utils.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    dress,
    make_figure,
    save_figure,
)
from bge_pruning.utils.summary_plot import plot_summary

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

__all__ = ["plot_gates", "plot_sparsity", "plot_summary"]

CMAP = "cividis"  # even in lightness, and the same to colour-blind readers
AXIS_TITLES = {
    "layer": "layers",
    "head": "attention heads",
    "intermediate": "intermediate units",
    "hidden": "hidden dimensions",
    "parameters": "parameters",
}


def plot_gates(
    gates: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray], path: str | Path
) -> None:
    """Draws the probability that each gate is open, and what the cut kept.

    Args:
        gates: Open probabilities in ``[0, 1]``: ``head`` ``(L, A)``, ``intermediate`` ``(L, F)``,
            ``layer`` ``(L,)``, ``hidden`` ``(H,)``. An axis that was not pruned is left out.
        kept: Booleans of the same shapes; an axis may be missing.
        path: Image file; the folder is made.

    Raises:
        ValueError: If there is no gate, a shape is wrong, or a value is no probability.
    """
    _check_gates(gates, kept)
    top = [axis for axis in ("layer", "head", "intermediate") if axis in gates]
    rows = len(gates[top[0]]) if top else 0
    widths = [{"layer": 0.9, "head": 4.0, "intermediate": 5.0}[axis] for axis in top] or [9.0]
    heights = ([min(7.5, max(2.2, 0.34 * rows))] if top else []) + (
        [0.55] if "hidden" in gates else []
    )
    figure = make_figure(sum(widths) + 1.6, sum(heights) + 0.9 * len(heights))
    grid = figure.add_gridspec(
        len(heights), len(widths) + 1, width_ratios=[*widths, 0.18], height_ratios=heights
    )
    for column, axis in enumerate(top):
        panel = figure.add_subplot(grid[0, column])
        _draw_layers(panel, axis, gates[axis], kept, first=column == 0)
    if "hidden" in gates:
        _draw_hidden(figure.add_subplot(grid[-1, :-1]), gates["hidden"], kept.get("hidden"))
    bar = figure.colorbar(figure.axes[0].images[0], cax=figure.add_subplot(grid[0, -1]))
    bar.set_label("probability that the gate is open" if top else "probability", fontsize=9)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def _check_gates(gates: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> None:
    import numpy as np

    dims = {"head": 2, "intermediate": 2, "layer": 1, "hidden": 1}
    if not set(gates) & set(dims):
        raise ValueError(
            f"no gates to draw among {sorted(gates)}. To fix, give one of {', '.join(dims)}."
        )
    for axis, values in gates.items():
        if np.ndim(values) != dims.get(axis):
            raise ValueError(
                f"gates of {axis} have shape {np.shape(values)}, not {dims.get(axis)} dimensions."
            )
        if axis in kept and np.shape(kept[axis]) != np.shape(values):
            raise ValueError(
                f"kept of {axis} has shape {np.shape(kept[axis])}, its gates {np.shape(values)}."
            )
        if not (np.min(values) >= 0 and np.max(values) <= 1):  # a NaN fails too
            raise ValueError(
                f"gates of {axis} are not in [0, 1]. To fix, give open probabilities, not "
                "log_alpha."
            )


def _draw_layers(
    panel: Axes, axis: str, values: np.ndarray, kept: Mapping[str, np.ndarray], *, first: bool
) -> None:
    """One panel with a row for each layer."""
    import numpy as np

    mask = kept.get(axis)
    gone = (
        np.flatnonzero(~kept["layer"].astype(bool)) if "layer" in kept else np.array([], dtype=int)
    )
    table = np.atleast_2d(values.T).T  # the layer gates become one column
    if axis == "intermediate":
        table = -np.sort(-table, axis=1)
    panel.imshow(table, cmap=CMAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    panel.set_title(_title(axis, mask, gone, len(table)), fontsize=10, loc="left")
    panel.spines[:].set_visible(False)
    panel.set_yticks(range(0, len(table), 1 if len(table) <= 12 else 2))
    panel.tick_params(length=0, labelleft=first)
    if first:
        panel.set_ylabel("layer")
    if axis == "head":
        _mark_removed_heads(panel, mask, gone)
    if axis == "intermediate" and mask is not None:
        _mark_cut(panel, mask, gone)
    _label_columns(panel, axis, table.shape[1])
    _strike_out(panel, gone, table.shape[1], label=axis != "layer")


def _title(axis: str, mask: np.ndarray | None, gone: np.ndarray, rows: int) -> str:
    """Says in words what was kept; only layers that stay are counted."""
    import numpy as np

    name = AXIS_TITLES[axis].capitalize()
    if axis == "layer":
        return f"Layers kept:\n{rows - len(gone)} of {rows}" if mask is not None else "Layers"
    if mask is None:
        return name
    counts = np.delete(mask, gone, axis=0).sum(axis=1) if mask.ndim == 2 else np.array([mask.sum()])
    if len(counts) == 0 or counts.min() != counts.max():
        total = mask.shape[-1] * len(counts)
        return f"{name} kept: {counts.sum():,} of {total:,}"
    return f"{name} kept: {counts[0]:,} of {mask.shape[-1]:,}" + (
        " per layer" if mask.ndim == 2 else ""
    )


def _label_columns(panel: Axes, axis: str, count: int) -> None:
    if axis == "layer":
        panel.set_xticks([])
    elif axis == "head":
        panel.set_xticks(range(0, count, 1 if count <= 16 else 2))
        panel.set_xlabel("head (x: removed)")
    else:
        panel.set_xlabel("unit, sorted by probability in each layer")
    if axis != "intermediate" and count > 1:  # thin gaps between cells
        for edge in range(1, count):
            panel.axvline(edge - 0.5, color="white", linewidth=0.6)
    for edge in range(1, int(panel.get_ylim()[0] + 0.5)):
        panel.axhline(edge - 0.5, color="white", linewidth=0.6)


def _mark_removed_heads(panel: Axes, mask: np.ndarray | None, gone: np.ndarray) -> None:
    import numpy as np

    if mask is None:
        return
    rows, columns = np.nonzero(~mask.astype(bool))
    stays = ~np.isin(rows, gone)
    rows, columns = rows[stays], columns[stays]
    # A dark rim under a white cross: legible on every colour of the map.
    panel.scatter(columns, rows, marker="x", s=34, color="black", linewidths=2.6)
    panel.scatter(columns, rows, marker="x", s=28, color="white", linewidths=1.3)


def _mark_cut(panel: Axes, mask: np.ndarray, gone: Sequence[int] = ()) -> None:
    """A tick in each row, where the kept units end."""
    rows = [row for row in range(len(mask)) if row not in gone]
    edges = [[row + side for row in rows] for side in (-0.5, 0.5)]
    for colour, width, label in (("white", 3, None), (RED, 1.6, "the cut")):
        panel.vlines(
            [mask[row].sum() - 0.5 for row in rows],
            *edges,
            color=colour,
            linewidth=width,
            label=label,
        )
    panel.legend(
        loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8, borderaxespad=0.2
    )


def _strike_out(panel: Axes, gone: np.ndarray, columns: int, *, label: bool) -> None:
    """Hatches the rows of removed layers."""
    from matplotlib.patches import Rectangle

    for row in gone:
        box = (-0.5, row - 0.5)
        panel.add_patch(
            Rectangle(
                box,
                columns,
                1,
                facecolor="#EDEDED",
                edgecolor="#A6A6A6",
                hatch="////",
                linewidth=0,
                zorder=3,
            )
        )
        if label:
            text = panel.text(
                (columns - 1) / 2,
                row,
                "layer removed",
                ha="center",
                va="center",
                fontsize=8,
                zorder=4,
            )
            text.set_bbox({"facecolor": "#EDEDED", "edgecolor": "none", "pad": 1.2})


def _draw_hidden(panel: Axes, values: np.ndarray, mask: np.ndarray | None) -> None:
    """The hidden gates as one strip, sorted by probability."""
    import numpy as np

    panel.imshow(
        -np.sort(-values)[None], cmap=CMAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    panel.set_title(_title("hidden", mask, np.array([], dtype=int), 0), fontsize=10, loc="left")
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_xlabel("dimension, sorted by probability")
    if mask is not None:
        _mark_cut(panel, mask[None])


def plot_sparsity(history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draws expected against target sparsity over training, and the task loss beside them.

    Args:
        history: Rows ``{"batch": int, "metrics": {key: number}}`` in any order; a row need not hold
            every key. Read are ``pruning/{expected,target,realised}_sparsity/<axis>``,
            ``loss/train/<name>`` and ``metrics/<label>/SpearmanCorrCoef``.
        path: Image file; the folder is made.

    Raises:
        ValueError: If no row has any of these keys.
    """
    series = _collect(history)
    axes = [key.rsplit("/", 1)[1] for key in series if key.startswith("pruning/expected_sparsity/")]
    losses = _task_losses(series)
    scores = [key for key in series if re.fullmatch(r"metrics/.+/SpearmanCorrCoef", key)]
    count = len(axes) + bool(losses) + bool(scores)
    if count == 0:
        raise ValueError(
            "the history holds no sparsity, loss or Spearman. To fix, give the metrics of a "
            "pruning run."
        )
    columns = min(3, count)
    rows = -(-count // columns)
    figure = make_figure(4.1 * columns, 2.9 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, axis in zip(panels, axes, strict=False):
        _draw_sparsity(panel, axis, series)
    if losses:
        _draw_losses(panels[len(axes)], losses, series)
    if scores:
        _draw_scores(panels[count - 1], scores, series)
    for panel in panels[count:]:
        panel.remove()
    save_figure(figure, path)


def _collect(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Batches and values of each finite logged number, in order of batch."""
    from math import isfinite

    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in sorted(history, key=lambda row: row["batch"]):
        for key, value in row["metrics"].items():
            if isinstance(value, int | float) and isfinite(value):
                batches, values = series.setdefault(key, ([], []))
                batches.append(row["batch"])
                values.append(value)
    return series


def _task_losses(series: Mapping[str, Any]) -> list[str]:
    """The parts of the task loss where they are logged, or else the total."""
    keys = [key for key in series if key.startswith("loss/train/")]
    parts = [
        key for key in keys if not re.search(r"total|lagrang|sparsity|pruning|constraint", key)
    ]
    return parts[:5] or keys[:1]


def _draw_sparsity(
    panel: Axes, axis: str, series: Mapping[str, tuple[list[int], list[float]]]
) -> None:
    styles = {
        "expected": {"color": BLUE, "linewidth": 1.8},
        "target": {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 3))},
        "realised": {
            "color": RED,
            "marker": "o",
            "markersize": 6,
            "linestyle": "none",
            "clip_on": False,
        },
    }
    for name, style in styles.items():
        batches, values = series.get(f"pruning/{name}_sparsity/{axis}", ([], []))
        percent = [100 * value for value in values]
        if name == "realised" and percent:
            batches, percent, name = (
                batches[-1:],
                percent[-1:],
                f"after the cut: {percent[-1]:.1f} %",
            )
        if percent:
            panel.plot(batches, percent, label=name, **style)
    bottom, top = panel.get_ylim()
    panel.set_ylim(min(0, bottom), max(5, 1.08 * top))
    panel.legend(loc="lower right", frameon=False, fontsize=8)
    _dress_history(panel, f"Removed {AXIS_TITLES.get(axis, axis)} (%)")


def _draw_losses(
    panel: Axes, keys: Sequence[str], series: Mapping[str, tuple[list[int], list[float]]]
) -> None:
    """Each loss as logged (faint) and as a running median."""
    import numpy as np

    for key, colour in zip(keys, (BLUE, ORANGE, GREEN, PURPLE, GREY), strict=False):
        batches, values = series[key]
        window = max(1, len(values) // 25)
        smooth = [
            np.median(values[max(0, i - window) : i + window + 1]) for i in range(len(values))
        ]
        panel.plot(batches, values, color=colour, linewidth=0.7, alpha=0.3)
        name = key.removeprefix("loss/train/").replace("_", " ")
        panel.plot(batches, smooth, color=colour, linewidth=1.6, label=name)
    everything = [value for key in keys for value in series[key][1]]
    if min(everything) > 0 and max(everything) > 30 * min(everything):
        panel.set_yscale("log")
    panel.legend(loc="upper right", frameon=False, fontsize=8)
    _dress_history(panel, "Task loss")


def _draw_scores(
    panel: Axes, keys: Sequence[str], series: Mapping[str, tuple[list[int], list[float]]]
) -> None:
    for key, colour in zip(keys, (GREEN, BLUE, ORANGE, PURPLE, GREY), strict=False):
        batches, values = series[key]
        panel.plot(
            batches,
            values,
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.5,
            label=key.split("/")[1],
        )
    panel.legend(loc="lower right", frameon=False, fontsize=8)
    panel.margins(y=0.25)
    _dress_history(panel, "Spearman while training")


def _dress_history(panel: Axes, title: str) -> None:
    panel.set_xlabel("training batch")
    panel.locator_params(axis="x", nbins=5, integer=True)
    dress(panel, title)
