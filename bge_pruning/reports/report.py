"""Write ``report.md`` and ``report.html``: what a run did, in words, tables and pictures.

Both are made from the same sections by the templates beside this module.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from bge_pruning.reports import history_plot
from bge_pruning.reports.markdown import escape, picture
from bge_pruning.reports.report_data import Inputs, pruned_axes, read_inputs
from bge_pruning.reports.report_sections import build_sections, glance, summarise_run, title_of
from bge_pruning.reports.score_plot import draw_scores
from bge_pruning.reports.summary_plot import can_summarise, draw_summary
from bge_pruning.utils.files import refuse_existing, write_text
from bge_pruning.utils.visualization import DARK, LIGHT, draw_gates, render_svg, save_figure

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

MARKDOWN, HTML = "report.md", "report.html"
CAPTIONS = {
    "summary.png": "Scores, parameters and speed beside the original model",
    "scores.png": "Score of each task and mode with its interval, the original's and the floor",
    "gates.png": "Probability that each gate is open, and what the cut kept",
    "constraint.png": "Expected and target sparsity of each axis, and what a cut would remove",
    "multipliers.png": "The multipliers that hold the gates to the constraint",
    "training.png": "Losses and scores while pruning",
    "recovery.png": "Losses and scores while training on the pruned model",
}
WIDTH = re.compile(r'<svg [^>]*?width="([\d.]+pt)"')
PATH_DATA = re.compile(r'(?<= d=")[^"]+')
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")


def write_report(
    folder: str | Path, *, commands: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Write the report of a results folder or of a run folder into it.

    The report is made from ``evaluation.json``, ``pruning.json``, ``metrics.jsonl`` and
    ``metrics-recovery.jsonl`` (one history row a line), ``gates.npz`` (open probabilities, and
    booleans under ``<axis>_kept``), ``config.yaml``, ``versions.json`` and ``commands.txt`` (one
    command a line; not read where ``commands`` are given). The sections of a missing file are left
    out, and the report says so.

    Returns:
        The path of ``report.md``, which has its pictures beside it; ``report.html`` holds the same
        and needs no other file.

    Raises:
        FileExistsError: If a report is there and ``overwrite`` is false.
        ValueError: If a file cannot be read, or lacks a key; the message names both.
    """
    folder = Path(folder)
    inputs = read_inputs(folder, commands)
    targets = [folder / name for name in (MARKDOWN, HTML, *CAPTIONS)]
    refuse_existing(targets, overwrite=overwrite)
    pictures = draw_pictures(inputs)
    try:
        texts = {name: render_report(inputs, pictures, name) for name in (HTML, MARKDOWN)}
    except KeyError as error:
        raise ValueError(
            f"{folder}: the results have no {error}. To fix, write them again with this version."
        ) from error
    for name, drawn in pictures.items():
        save_figure(drawn.figure, folder / name)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder / MARKDOWN


@dataclass(frozen=True)
class Picture:
    """A picture to be saved beside ``report.md``, and its SVG for light and for dark pages."""

    figure: Figure
    light: str
    dark: str


def draw_pictures(inputs: Inputs) -> dict[str, Picture]:
    """Draw every picture that the inputs allow, under its file name."""
    pictures = {}
    for name, draw in find_pictures(inputs).items():
        light, dark = draw(theme=LIGHT), draw(theme=DARK)
        pictures[name] = Picture(light, render_svg(light, LIGHT), render_svg(dark, DARK))
    return pictures


def find_pictures(inputs: Inputs) -> dict[str, Callable[..., Figure]]:
    """A function of ``theme`` for each picture that can be drawn."""
    draws: dict[str, Callable[..., Figure]] = {}
    if (evaluation := inputs.evaluation) is not None:
        if can_summarise(evaluation):
            draws["summary.png"] = partial(draw_summary, evaluation)
        if scores := evaluation.main_scores():
            draws["scores.png"] = partial(draw_scores, scores)
    if inputs.gates:
        draws["gates.png"] = partial(draw_gates, inputs.gates, inputs.kept)
    if pruned_axes(inputs.series):
        draws["constraint.png"] = partial(history_plot.draw_constraint, inputs.series)
    if history_plot.has_multipliers(inputs.series):
        draws["multipliers.png"] = partial(history_plot.draw_multipliers, inputs.series)
    if history_plot.has_training(inputs.series):
        draws["training.png"] = partial(history_plot.draw_training, inputs.series)
    if history_plot.has_training(inputs.recovery):
        draws["recovery.png"] = partial(history_plot.draw_training, inputs.recovery)
    return draws


def render_report(inputs: Inputs, pictures: Mapping[str, Picture], name: str) -> str:
    """Fill the template of ``report.md`` or ``report.html``."""
    blocks = {name: picture(CAPTIONS[name], name) for name in pictures}
    content = {
        "title": title_of(inputs),
        "summary": summarise_run(inputs),
        "intro": [*glance(inputs), *(blocks[name] for name in blocks if name == "summary.png")],
        "sections": build_sections(inputs, blocks),
        "missing": inputs.missing,
        "pictures": pictures,
        "themes": {"light": LIGHT, "dark": DARK},
    }
    return _templates().get_template(f"{name}.jinja").render(content)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(("html.jinja",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"markdown": escape, "data_uri": _data_uri, "width": _width}
    return environment


def _data_uri(svg: str) -> str:
    """A picture as an address; a hundredth of a point is invisible and makes it a third smaller."""
    short = PATH_DATA.sub(
        lambda path: LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", path[0]), svg
    )
    return "data:image/svg+xml;base64," + base64.b64encode(short.encode()).decode()


def _width(svg: str) -> str:
    return width[1] if (width := WIDTH.search(svg)) else ""
