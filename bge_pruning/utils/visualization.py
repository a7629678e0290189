"""The look that all pictures share, and the map of the gates.

A ``Figure`` is made without ``pyplot``, so the global backend is never touched. Colours come from a
:class:`Theme`, so that every picture exists for light and for dark pages.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bge_pruning.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 180
# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILION, PURPLE, YELLOW = "#D55E00", "#CC79A7", "#F0E442"
# The map of colours is even in lightness, and the same to colour-blind readers.
MAP = {"cmap": "cividis", "vmin": 0, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
NONE = np.array([], dtype=int)


@dataclass(frozen=True)
class Theme:
    """Colours of a page and of the pictures on it.

    ``muted`` is for axes, small text and what is only for comparison; ``grid`` also for what is
    removed; ``series`` for lines and bars: the first is the model at hand, and each stands out from
    the surface by 3 to 1 or more; ``fills`` for large areas (encoder, embeddings, the rest).
    """

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    fills: tuple[str, str, str]

    def settings(self) -> dict[str, Any]:
        """Matplotlib's settings for this theme."""
        return {
            **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), self.surface),
            "axes.facecolor": "none",
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), self.ink),
            **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), self.ink),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.muted),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
            **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
            "font.family": ["DejaVu Sans"],  # comes with matplotlib
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 8,
            "axes.axisbelow": True,
            "grid.color": self.grid,
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "lines.solid_capstyle": "round",
            "text.parse_math": False,  # a name may hold dollars
            "svg.fonttype": "path",  # the same on a machine without the font
            "svg.hashsalt": "bge_pruning",  # the same file from the same numbers
        }

    def context(self) -> AbstractContextManager[None]:
        """Draw everything inside with this theme."""
        import matplotlib

        return matplotlib.rc_context(self.settings())


LIGHT = Theme(
    name="light",
    surface="#FFFFFF",
    ink="#1C2126",
    muted="#66707A",
    grid="#E2E6EA",
    series=(BLUE, VERMILION, GREEN, PURPLE, "#000000"),
    fills=(BLUE, SKY, "#C5CBD1"),
)
DARK = Theme(
    name="dark",
    surface="#15191E",
    ink="#E6E9EC",
    muted="#98A2AC",
    grid="#2D343B",
    series=(SKY, ORANGE, GREEN, PURPLE, YELLOW),
    fills=(SKY, BLUE, "#59626B"),
)
THEMES = (LIGHT, DARK)


def make_figure(width: float, height: float) -> Figure:
    """A figure of its own, sized in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def save_figure(figure: Figure, path: str | Path, theme: Theme = LIGHT) -> None:
    """Write the image atomically, in the theme it was drawn with; the suffix decides the format."""
    with atomic_file(path) as partial, theme.context():
        figure.savefig(partial)


def render_svg(figure: Figure, theme: Theme = LIGHT) -> str:
    """The figure as SVG without a date: two calls give the same text."""
    text = io.StringIO()
    with theme.context():
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def render_pixels(figure: Figure, theme: Theme = LIGHT, dpi: int = 100) -> np.ndarray:
    """The figure as an image: bytes of shape ``(height, width, 3)``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with theme.context():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def dress(panel: Axes, title: str, *, grid: str = "y") -> None:
    """Give an axis its title and a light grid."""
    panel.set_title(title)
    panel.grid(axis=grid)


def luminance(colour: str) -> float:
    """Relative luminance of ``#RRGGBB`` as WCAG 2 defines it, in [0, 1]."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: str, other: str) -> float:
    """Contrast of two colours as WCAG 2 defines it, from 1 to 21."""
    dark, light = sorted((luminance(colour), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def text_on(colour: str) -> str:
    """Black or white, whichever stands out more."""
    return max(("#000000", "#FFFFFF"), key=lambda text: contrast(text, colour))


def legend_label(name: str) -> str:
    """A name from the data as a label: matplotlib would leave out those that start with ``_``."""
    return f" {name}" if name.startswith("_") else name


AXIS_TITLES = {
    "layer": "layers",
    "head": "attention heads",
    "intermediate": "intermediate units",
    "hidden": "hidden dimensions",
    "encoder": "encoder parameters",
    "operations": "operations",
}
WIDTHS = {"layer": 0.9, "head": 3.4, "intermediate": 4.4}
HIDDEN_HEIGHT = 0.55
DIMENSIONS = {"head": 2, "intermediate": 2, "layer": 1, "hidden": 1}


def draw_gates(
    gates: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray], theme: Theme = LIGHT
) -> Figure:
    """Draw the probability that each gate is open, and what the cut kept.

    Args:
        gates: Open probabilities in ``[0, 1]``: ``head`` ``(L, A)``, ``intermediate`` ``(L, F)``,
            ``layer`` ``(L,)``, ``hidden`` ``(H,)``. An axis that was not pruned is left out.
        kept: Booleans of the same shapes; an axis may be missing.
        theme: Colours.
    """
    _check_gates(gates, kept)
    top = [axis for axis in WIDTHS if axis in gates]
    rows = len(gates[top[0]]) if top else 0
    widths = [WIDTHS[axis] for axis in top] or [8.0]
    heights = [min(7.5, max(2.2, 0.3 * rows))] if top else []
    heights += [HIDDEN_HEIGHT] if "hidden" in gates else []
    with theme.context():
        figure = make_figure(sum(widths) + 1.6, sum(heights) + 0.9 * len(heights))
        grid = figure.add_gridspec(
            len(heights), len(widths) + 1, width_ratios=[*widths, 0.18], height_ratios=heights
        )
        for column, axis in enumerate(top):
            panel = figure.add_subplot(grid[0, column])
            _draw_layers(panel, axis, gates[axis], kept, theme)
            panel.tick_params(labelleft=column == 0)
            panel.set_ylabel("" if column else "layer")
        if "hidden" in gates:
            panel = figure.add_subplot(grid[-1, :-1])
            _draw_hidden(panel, gates["hidden"], kept.get("hidden"))
        bar = figure.colorbar(figure.axes[0].images[0], cax=figure.add_subplot(grid[0, -1]))
        bar.set_label("probability that the gate is open" if top else "probability")
        bar.outline.set_visible(False)
    return figure


def _check_gates(gates: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> None:
    if not set(gates) & set(DIMENSIONS):
        raise ValueError(
            f"no gates to draw among {sorted(gates)}. To fix, give one of {', '.join(DIMENSIONS)}."
        )
    for axis, values in gates.items():
        if np.ndim(values) != DIMENSIONS.get(axis):
            raise ValueError(
                f"gates of {axis} have shape {np.shape(values)}, not {DIMENSIONS.get(axis)} "
                "dimensions. To fix, write the gates again."
            )
        if axis in kept and np.shape(kept[axis]) != np.shape(values):
            raise ValueError(
                f"kept of {axis} has shape {np.shape(kept[axis])}, its gates {np.shape(values)}. "
                "To fix, write the gates again."
            )
        if not (np.min(values) >= 0 and np.max(values) <= 1):  # a NaN fails too
            fix = "give open probabilities, not log_alpha"
            raise ValueError(f"gates of {axis} are not in [0, 1]. To fix, {fix}.")


def _draw_layers(
    panel: Axes, axis: str, values: np.ndarray, kept: Mapping[str, np.ndarray], theme: Theme
) -> None:
    mask = kept.get(axis)
    gone = np.flatnonzero(~kept["layer"].astype(bool)) if "layer" in kept else NONE
    table = np.atleast_2d(values.T).T  # the layer gates become one column
    if axis == "intermediate":
        table = -np.sort(-table, axis=1)
    panel.imshow(table, **MAP)
    panel.set_title(_title(axis, mask, gone, len(table)))
    panel.spines[:].set_visible(False)
    panel.set_yticks(range(0, len(table), 1 if len(table) <= 12 else 2))
    panel.tick_params(length=0)
    if axis == "head":
        _mark_removed_heads(panel, mask, gone)
    if axis == "intermediate" and mask is not None:
        _mark_cut(panel, mask, gone)
    _label_columns(panel, axis, table.shape[1], theme)
    _strike_out(panel, gone, table.shape[1], theme, label=axis != "layer")


def _title(axis: str, mask: np.ndarray | None, gone: np.ndarray, rows: int) -> str:
    """Say in words what was kept; only layers that stay are counted."""
    name = AXIS_TITLES[axis].capitalize()
    if axis == "layer":
        return f"Layers kept:\n{rows - len(gone)} of {rows}" if mask is not None else "Layers"
    if mask is None:
        return name
    counts = np.delete(mask, gone, axis=0).sum(axis=1) if mask.ndim == 2 else np.array([mask.sum()])
    if len(counts) == 0 or counts.min() != counts.max():
        total = mask.shape[-1] * len(counts)
        return f"{name} kept: {counts.sum():,} of {total:,}"
    each = " per layer" if mask.ndim == 2 else ""
    return f"{name} kept: {counts[0]:,} of {mask.shape[-1]:,}{each}"


def _label_columns(panel: Axes, axis: str, count: int, theme: Theme) -> None:
    if axis == "layer":
        panel.set_xticks([])
    elif axis == "head":
        panel.set_xticks(range(0, count, 1 if count <= 12 else 2))
        panel.set_xlabel("head (x: removed)")
    else:
        panel.set_xlabel("unit, sorted by probability (orange: the cut)")
    if axis != "intermediate" and count > 1:  # thin gaps between cells
        for edge in range(1, count):
            panel.axvline(edge - 0.5, color=theme.surface, linewidth=0.6)
    for edge in range(1, int(panel.get_ylim()[0] + 0.5)):
        panel.axhline(edge - 0.5, color=theme.surface, linewidth=0.6)


def _mark_removed_heads(panel: Axes, mask: np.ndarray | None, gone: np.ndarray) -> None:
    if mask is None:
        return
    rows, columns = np.nonzero(~mask.astype(bool))
    stays = ~np.isin(rows, gone)
    rows, columns = rows[stays], columns[stays]
    # A dark rim under a white cross: legible on every colour of the map, in either theme.
    panel.scatter(columns, rows, marker="x", s=34, color="black", linewidths=2.6)
    panel.scatter(columns, rows, marker="x", s=28, color="white", linewidths=1.3)


def _mark_cut(panel: Axes, mask: np.ndarray, gone: Sequence[int] = ()) -> None:
    rows = [row for row in range(len(mask)) if row not in gone]
    edges = [[row + side for row in rows] for side in (-0.5, 0.5)]
    for colour, width in (("white", 3), (VERMILION, 1.6)):
        ends = [mask[row].sum() - 0.5 for row in rows]
        panel.vlines(ends, *edges, color=colour, linewidth=width)


def _strike_out(panel: Axes, gone: np.ndarray, columns: int, theme: Theme, *, label: bool) -> None:
    from matplotlib.patches import Rectangle

    for row in gone:
        look = {"facecolor": theme.grid, "edgecolor": theme.muted, "hatch": "////"}
        box = Rectangle((-0.5, row - 0.5), columns, 1, linewidth=0, zorder=3, **look)
        panel.add_patch(box)
        if label:
            middle = {"ha": "center", "va": "center", "fontsize": 8, "zorder": 4}
            text = panel.text((columns - 1) / 2, row, "layer removed", **middle)
            text.set_bbox({"facecolor": theme.grid, "edgecolor": "none", "pad": 1.2})


def _draw_hidden(panel: Axes, values: np.ndarray, mask: np.ndarray | None) -> None:
    panel.imshow(-np.sort(-values)[None], **MAP)
    panel.set_title(_title("hidden", mask, NONE, 0))
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_xlabel("dimension, sorted by probability (orange: the cut)")
    if mask is not None:
        _mark_cut(panel, mask[None])
