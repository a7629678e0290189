"""The report of a study, made from its finished cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bge_pruning.reports.study_plot import draw_study
from bge_pruning.reports.study_summary import (
    Estimate,
    find_keys,
    floor_shares,
    group_cells,
    kept_of,
    render_study,
)
from bge_pruning.utils.files import lock_of, write_json, write_text
from bge_pruning.utils.study_records import read_cells, read_reference
from bge_pruning.utils.visualization import save_figure

TABLE, PICTURE, SUMMARY = "table.md", "pareto.png", "summary.json"


def write_study_report(folder: Path) -> Path:
    """Write ``table.md``, ``pareto.png`` and ``summary.json`` beside the cells of a study.

    Args:
        folder: Results folder of the study; an earlier report is replaced.

    Returns:
        The path of the table.

    Raises:
        FileNotFoundError: If no cell is finished.
        ValueError: If a file is no finished cell, or the cells have no task in common.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. To fix, run the study first.")
    with lock_of(folder / TABLE):  # several processes may end at once, and the last has all cells
        cells, reference = read_cells(folder), read_reference(folder)
        if not find_keys(cells):
            raise ValueError(
                f"{folder / 'cells'}: the cells have no task in common. To fix, keep the results "
                f"of each study in a folder of its own."
            )
        save_figure(draw_study(cells, reference), folder / PICTURE)
        write_json(summarise(cells, reference), folder / SUMMARY, overwrite=True)
        text = render_study(cells, reference)
        write_text(folder / TABLE, f"{text}\n![Quality kept against size]({PICTURE})\n")
    return folder / TABLE


def summarise(cells: Sequence[dict[str, Any]], reference: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the table and the picture.

    Args:
        cells: See :func:`read_cells`.
        reference: See :func:`read_reference`.

    Returns:
        ``groups``, one for each size and method, with the shares kept by ``TASK, MODE`` and their
        ``mean``; and ``floor``, the same of the better floor.
    """
    keys, floors = find_keys(cells), floor_shares(reference)
    named = {"mean": keys, **{f"{task}, {mode}": [(task, mode)] for task, mode in keys}}
    groups = []
    for group in group_cells(cells):
        first = group.cells[0]
        kept = {
            name: _as_dict(group.estimate(kept_of(cell, part) for cell in group.cells))
            for name, part in named.items()
        }
        groups.append(
            {
                **{"size": group.size, "method": group.method, "learned": group.learned},
                "seeds": [cell["seed"] for cell in group.cells],
                "encoder_share": first["encoder_share"],
                "encoder": first["parameters"]["encoder"],
                "kept": kept,
            }
        )
    known = {name: [floors[k] for k in part if k in floors] for name, part in named.items()}
    floor = {name: fmean(values) for name, values in known.items() if values}
    return {"groups": groups, "floor": floor, "original": reference["original"]}


def _as_dict(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else {"mean": estimate.mean, "half_interval": estimate.half}
