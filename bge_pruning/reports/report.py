"""Writes ``report.md`` and ``report.html``: what a run did, in words, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bge_pruning.reports.report_data import read_inputs
from bge_pruning.reports.report_html import render_html
from bge_pruning.reports.report_pictures import CAPTIONS, draw_pictures
from bge_pruning.reports.report_sections import render_sections
from bge_pruning.utils.files import refuse_existing, write_text
from bge_pruning.utils.visualization import save_figure

MARKDOWN, HTML = "report.md", "report.html"


def write_report(
    folder: str | Path, *, commands: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Writes the report of a results folder or of a run folder into it.

    Read are ``evaluation.json``, ``pruning.json``, ``metrics.jsonl`` and
    ``metrics-recovery.jsonl`` (one history row a line), ``gates.npz`` (open probabilities, and
    booleans under ``<axis>_kept``), ``config.yaml``, ``versions.json`` and ``commands.txt`` (one
    command a line). A file that is missing costs its sections, and the report says so.

    Written are ``report.md`` with its pictures beside it, and ``report.html``, which holds the
    same and needs nothing else.

    Args:
        folder: Folder with the inputs.
        commands: Commands that reproduce the run; ``commands.txt`` is then not read.
        overwrite: Whether an existing report and its pictures may be replaced.

    Returns:
        The path of ``report.md``.

    Raises:
        FileNotFoundError: If the folder has neither an evaluation, nor an extraction, nor a
            history.
        FileExistsError: If a report is there and ``overwrite`` is false.
        ValueError: If a file cannot be read, or lacks a key; the message names both.
    """
    folder = Path(folder)
    inputs = read_inputs(folder, commands)
    targets = [folder / name for name in (MARKDOWN, HTML, *CAPTIONS)]
    refuse_existing(targets, overwrite=overwrite)
    try:
        pictures = draw_pictures(inputs)
        sections = render_sections(inputs, pictures)
    except KeyError as error:
        raise ValueError(
            f"{folder}: the results have no {error}. To fix, write them again with this version."
        ) from error
    text = "\n\n".join(sections) + "\n"
    page = render_html(text, pictures)
    for name, picture in pictures.items():
        save_figure(picture.figure, folder / name)
    write_text(folder / HTML, page)
    write_text(folder / MARKDOWN, text)
    return folder / MARKDOWN
