"""Which pictures a report has, and what they say to those who cannot see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bge_pruning.reports.history_plot import (
    draw_constraint,
    draw_multipliers,
    draw_training,
    has_multipliers,
    has_training,
)
from bge_pruning.reports.report_data import Inputs, pruned_axes
from bge_pruning.reports.score_plot import draw_scores
from bge_pruning.reports.summary_plot import compute_gains, count_models, draw_summary
from bge_pruning.utils.tasks import main_scores
from bge_pruning.utils.visualization import DARK, LIGHT, draw_gates, render_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS = {
    "summary.png": "Scores, parameters and speed beside the original model",
    "scores.png": "Score of each task and mode with its interval, the original's and the floor",
    "gates.png": "Probability that each gate is open, and what the cut kept",
    "constraint.png": "Expected and target sparsity of each axis, and what a cut would remove",
    "multipliers.png": "The multipliers that hold the gates to the constraint",
    "training.png": "Losses and scores while pruning",
    "recovery.png": "Losses and scores while training on the pruned model",
}


@dataclass(frozen=True)
class Picture:
    """A picture in both themes.

    Attributes:
        figure: In the light theme, to be saved beside ``report.md``.
        light: SVG for light pages.
        dark: SVG for dark pages.
    """

    figure: Figure
    light: str
    dark: str


def draw_pictures(inputs: Inputs) -> dict[str, Picture]:
    """Draws every picture that the inputs allow.

    Args:
        inputs: What the folder holds.

    Returns:
        Pictures under their file names, a part of ``CAPTIONS``.
    """
    pictures = {}
    for name, draw in find_pictures(inputs).items():
        light, dark = draw(theme=LIGHT), draw(theme=DARK)
        pictures[name] = Picture(light, render_svg(light, LIGHT), render_svg(dark, DARK))
    return pictures


def find_pictures(inputs: Inputs) -> Mapping[str, Callable[..., Figure]]:
    """A function of ``theme`` for each picture that can be drawn."""
    draws: dict[str, Callable[..., Figure]] = {}
    if (evaluation := inputs.evaluation) is not None:
        scores = main_scores(evaluation)
        if scores or count_models(evaluation["parameters"]) or compute_gains(evaluation):
            draws["summary.png"] = partial(draw_summary, evaluation)
        if scores:
            draws["scores.png"] = partial(draw_scores, scores)
    if inputs.gates:
        draws["gates.png"] = partial(draw_gates, inputs.gates, inputs.kept)
    if pruned_axes(inputs.series):
        draws["constraint.png"] = partial(draw_constraint, inputs.series)
    if has_multipliers(inputs.series):
        draws["multipliers.png"] = partial(draw_multipliers, inputs.series)
    if has_training(inputs.series):
        draws["training.png"] = partial(draw_training, inputs.series)
    if has_training(inputs.recovery):
        draws["recovery.png"] = partial(draw_training, inputs.recovery)
    return draws
