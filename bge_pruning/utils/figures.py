"""What every picture of this package shares: size, colours, the look of an axis, an atomic save.

A ``Figure`` is made without ``pyplot``, so the global backend is never touched. Colours come from a
:class:`Theme`, so that every picture exists for light and for dark pages.
"""

from __future__ import annotations

import io
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 180
# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, SKY, ORANGE, GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
VERMILION, PURPLE, YELLOW = "#D55E00", "#CC79A7", "#F0E442"
CMAP = "cividis"  # even in lightness, and the same to colour-blind readers


@dataclass(frozen=True)
class Theme:
    """Colours of a page and of the pictures on it.

    Attributes:
        name: ``light`` or ``dark``.
        surface: Background.
        ink: Text.
        muted: Axes, small text and what is only for comparison.
        grid: Lines behind the data, and what is removed.
        series: Colours of lines and bars; the first is the model at hand. Each stands out from the
            surface by 3 to 1 or more.
        fills: Large areas beside each other (encoder, embeddings, the rest).
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
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), self.ink),
            **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), self.ink),
            **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), self.muted),
            **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
            **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8.5),
            "figure.facecolor": self.surface,
            "savefig.facecolor": self.surface,
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
        """Everything drawn inside has this theme."""
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
    """Writes the image atomically.

    Args:
        figure: Drawn with ``theme``; what it adds while it is laid out (ticks) has it too.
        path: The suffix decides the format; the folder is made.
        theme: Colours.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with theme.context():
            figure.savefig(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def render_svg(figure: Figure, theme: Theme = LIGHT) -> str:
    """The figure as SVG without a date: two calls give the same text."""
    text = io.StringIO()
    with theme.context():
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def render_pixels(figure: Figure, theme: Theme = LIGHT, dpi: int = 100) -> np.ndarray:
    """The figure as an image.

    Args:
        figure: Drawn with ``theme``.
        theme: Colours.
        dpi: Pixels in an inch.

    Returns:
        Bytes of shape ``(height, width, 3)``.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with theme.context():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def dress(panel: Axes, title: str, *, grid: str = "y") -> None:
    """Gives an axis its title and a light grid."""
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
