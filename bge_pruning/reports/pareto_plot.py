"""The choice between several models in one picture: quality against size and against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from bge_pruning.reports.comparison import ORIGINAL, Candidate, pareto_front
from bge_pruning.utils.visualization import BLUE, LIGHT, dress, make_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_pareto(candidates: Sequence[Candidate], path: str | Path) -> None:
    """Draw what each model keeps against its parameters, and against its time if it was measured.

    Points that no other one beats are joined. Several runs of a model have a bar from the lowest
    to the highest.

    Args:
        candidates: The original and the others.
        path: Image file; the folder is made.
    """
    timed = [c for c in candidates if c.latency is not None]
    panels = 2 if len(timed) > 1 else 1
    with LIGHT.context():
        figure = make_figure(5.2 * panels + 0.4, 4.2)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw(axes[0], candidates, [c.encoder / 1e6 for c in candidates])
        axes[0].set_xlabel("parameters of the encoder (millions)")
        dress(axes[0], "Quality kept against size")
        if panels == 2:
            _draw(axes[1], timed, [100 * c.latency for c in timed])
            axes[1].set_xlabel("time of one text (% of the original's)")
            dress(axes[1], "Quality kept against measured time")
        axes[0].set_ylabel("kept of the original's score (%)")
    save_figure(figure, path, LIGHT)


def _draw(panel: Axes, candidates: Sequence[Candidate], costs: Sequence[float]) -> None:
    kept = [100 * fmean(c.kept) for c in candidates]
    front = pareto_front(costs, kept)
    panel.step(
        [costs[i] for i in front], [kept[i] for i in front],
        where="post", color=BLUE, linewidth=1.3, alpha=0.6, zorder=1,
    )  # fmt: skip
    for index, (candidate, cost, quality) in enumerate(zip(candidates, costs, kept, strict=True)):
        low, high = 100 * min(candidate.kept), 100 * max(candidate.kept)
        colour = LIGHT.muted if candidate.name == ORIGINAL or index not in front else BLUE
        marker = "D" if candidate.name == ORIGINAL else "o"
        panel.errorbar(
            cost, quality, yerr=[[quality - low], [high - quality]],
            marker=marker, color=colour, capsize=3, markersize=7, zorder=2,
        )  # fmt: skip
        panel.annotate(
            candidate.name, (cost, quality), (6, -11), textcoords="offset points", fontsize=8
        )
    panel.margins(x=0.18, y=0.15)
