"""An evaluation as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bge_pruning.utils.retrieval_table import HEADER, retrieval_rows
from bge_pruning.utils.tasks import similarity_tasks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HIDDEN = ("95 % interval", "MRR@10", "Recall@100", "MAP")


def _tabulate(tasks: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The rows of the table: what is shown, as rich markup, and a cell for each task."""
    from rich.markup import escape

    def cells(values: Sequence[float | None], style: str) -> list[str]:
        return ["-" if value is None else format(value, style) for value in values]

    # A list: another model may have the name of a row.
    rows = [("baseline", cells([task["baseline"] for task in tasks], ".4f"))]
    for name in tasks[0].get("also", {}):
        rows.append((escape(name), cells([task["also"][name] for task in tasks], ".4f")))
    rows.append(("[bold]model", cells([task["value"] for task in tasks], ".4f")))
    for name in tasks[0]["floors"]:
        label = f"floor: {name.replace('_', ' ')}"
        rows.append((label, cells([task["floors"][name] for task in tasks], ".4f")))
    rows.append(("kept of the baseline", cells([task["retention"] for task in tasks], ".1%")))
    above = [task["retention_above_floor"] for task in tasks]
    rows.append(("kept above the floor", cells(above, ".1%")))
    return rows


def show_evaluation(result: dict[str, Any], console: Console) -> None:
    """Print scores, and under them parameters and speed.

    Args:
        result: What :func:`bge_pruning.utils.evaluation.evaluate` returned.
        console: Where to print; scripts own the terminal, the package does not.
    """
    from rich.markup import escape
    from rich.table import Table

    if similarity := similarity_tasks(result):
        table = Table("cosine Spearman (dense)")
        for task in similarity:
            table.add_column(escape(task["task"]), justify="right")
        for label, cells in _tabulate(similarity):
            table.add_row(label, *cells)
        console.print(table)
    if retrieval_rows(result):
        console.print(_retrieval_table(result))
    console.print(_parameter_table(result["parameters"]))
    if result["speed"]:
        latency, rate = result["speed"]["latency_ms"], result["speed"]["throughput_texts_per_s"]
        one = (
            f"{latency['model']['median']:.1f} ms, baseline {latency['baseline']['median']:.1f} ms"
        )
        many = f"{rate['model']:.0f}, baseline {rate['baseline']:.0f} ({rate['ratio']:.2f} times)"
        console.print(f"one text: {one}; texts per second: {many}", soft_wrap=True)


def _retrieval_table(result: dict[str, Any]) -> Table:
    """What fits on a terminal; the file holds the other metrics too."""
    from rich.markup import escape
    from rich.table import Table

    shown = [i for i, name in enumerate(HEADER) if name not in HIDDEN]
    table = Table()
    for index in shown:
        table.add_column(HEADER[index], justify="left" if index < 2 else "right", no_wrap=True)
    for cells in retrieval_rows(result):
        table.add_row(*(escape(cells[index]) for index in shown))
    return table


def _parameter_table(parameters: dict[str, dict[str, int] | None]) -> Table:
    from rich.table import Table

    table = Table("parameters")
    named = {which: counts for which, counts in parameters.items() if counts}
    for which in reversed(named):
        table.add_column(which, justify="right")
    if len(named) == 2:
        table.add_column("kept", justify="right")
    for part in next(iter(named.values())):
        counts = [counts[part] for counts in reversed(named.values())]
        cells = [f"{count:,}" for count in counts]
        if len(counts) == 2 and counts[0]:
            cells.append(f"{counts[1] / counts[0]:.1%}")
        table.add_row(part, *cells)
    return table
