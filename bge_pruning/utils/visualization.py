"""The pictures of a run, each a function from numbers and a theme to a figure."""

from __future__ import annotations

from bge_pruning.utils.figures import DARK, LIGHT, THEMES, Theme, render_svg, save_figure
from bge_pruning.utils.gate_map import draw_gates
from bge_pruning.utils.history_plot import draw_constraint, draw_multipliers, draw_training
from bge_pruning.utils.score_plot import draw_scores
from bge_pruning.utils.summary_plot import draw_summary

__all__ = [
    "DARK",
    "LIGHT",
    "THEMES",
    "Theme",
    "draw_constraint",
    "draw_gates",
    "draw_multipliers",
    "draw_scores",
    "draw_summary",
    "draw_training",
    "render_svg",
    "save_figure",
]
