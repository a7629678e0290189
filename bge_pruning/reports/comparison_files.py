"""A comparison of evaluated models as files: JSON, Markdown and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bge_pruning.reports.comparison import (
    Candidate,
    Key,
    describe_comparison,
    read_candidates,
    render_comparison,
)
from bge_pruning.reports.pareto_plot import plot_pareto
from bge_pruning.utils.files import refuse_existing, write_json, write_text

FILES = ("comparison.json", "comparison.md", "pareto.png")


def write_comparison(
    results: Sequence[str], output: Path, overwrite: bool = False
) -> tuple[list[Candidate], list[Key]]:
    """Compare evaluated models and write the result.

    Args:
        results: See :func:`bge_pruning.reports.comparison.read_candidates`.
        output: Folder to write into.
        overwrite: Replace an earlier comparison.

    Returns:
        The models and the scores that all of them have.

    Raises:
        FileExistsError: If a file is there and ``overwrite`` is false.
        FileNotFoundError: See :func:`read_candidates`, also for ``ValueError``.
    """
    data, text, picture = (output / name for name in FILES)
    refuse_existing([data, text, picture], overwrite=overwrite)
    candidates, keys = read_candidates(results)
    write_json(describe_comparison(candidates, keys), data, overwrite=overwrite)
    write_text(text, render_comparison(candidates, keys) + "\n![Pareto plot](pareto.png)\n")
    plot_pareto(candidates, picture)
    return candidates, keys
