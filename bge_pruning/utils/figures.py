"""What every picture of this package shares: size, colours, the look of an axis, an atomic save.

A ``Figure`` is made without ``pyplot``, so the global backend is never touched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 180
# Okabe and Ito's colours, told apart by colour-blind readers too.
GREY, BLUE, SKY, ORANGE, GREEN = "#8C8C8C", "#0072B2", "#56B4E9", "#E69F00", "#009E73"
RED, PURPLE = "#D55E00", "#CC79A7"


def make_figure(width: float, height: float) -> Figure:
    """A figure of its own, sized in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes the image atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        figure.savefig(temporary, facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def dress(panel: Axes, title: str) -> None:
    """Gives an axis its title, a light grid and no box."""
    panel.set_title(title, fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    panel.set_axisbelow(True)
