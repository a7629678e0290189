"""Print evaluations and comparisons as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bge_pruning.reports.comparison import Candidate, summary_header, summary_rows
from bge_pruning.reports.report_tables import (
    LABELS,
    PARTS,
    evaluation_notes,
    mean_rows,
    score_header,
    score_rows,
)
from bge_pruning.reports.summary_plot import count_models
from bge_pruning.utils.records import EvaluationRecord, Parameters

SHORT = {"random weights": "floor: random", "words alone": "floor: words"}
WIDTH = 11  # of a line in a heading


def show_evaluation(result: EvaluationRecord, console: Console | None = None) -> None:
    """Print scores, and under them parameters and speed, on the terminal of a script."""
    console = console or Console(highlight=False)
    header = score_header(result)
    print_whole(_score_table(header, score_rows(result)), console)
    for note in evaluation_notes(result):
        console.print(note, markup=False, soft_wrap=True)
    if result.means:
        print_whole(_score_table(header, mean_rows(result)), console)
    print_whole(_parameter_table(count_models(result)), console)
    if result.speed is None:
        return
    latency, rate = result.speed.latency_ms, result.speed.throughput_texts_per_s
    if None in (latency.model, latency.baseline, rate.model, rate.baseline):
        return
    one = f"{latency.model.median:.1f} ms, original {latency.baseline.median:.1f} ms"
    many = f"{rate.model:.0f}, original {rate.baseline:.0f} ({rate.ratio:.2f} times)"
    console.print(f"one text: {one}; texts per second: {many}", soft_wrap=True)
    if result.speed.load:
        console.print(f"while this was measured, {result.speed.load}", soft_wrap=True)


def print_whole(table: Table, console: Console) -> None:
    """Print a table at its full width: a terminal can be widened, but cut numbers are lost."""
    given = console.width
    console.width = 1000
    console.width = max(given, console.measure(table).maximum)
    console.print(table, crop=False)
    console.width = given


def _score_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Scores by mode, grouped by task to be narrow; columns without any value are left out."""
    header = ["\n".join(wrap(SHORT.get(name, name), WIDTH)) for name in names]
    shown = [i for i in range(LABELS, len(header)) if any(row[i] != "-" for row in rows)]
    table = _make_table(["", *(escape(header[index]) for index in shown)])
    previous = None
    for row in rows:
        task, mode, metric = row[:LABELS]
        if task != previous:
            table.add_row(f"[bold]{escape(task)}[/bold], {metric}")
        table.add_row(f"  {mode}", *(escape(row[index]) for index in shown))
        previous = task
    return table


def _parameter_table(models: dict[str, Parameters]) -> Table:
    table = Table("parameters")
    for name in models:
        table.add_column({"pruned": "model"}.get(name, name), justify="right")
    if len(models) == 2:
        table.add_column("kept", justify="right")
    for part in PARTS if models else ():
        counts = [getattr(parameters, part) for parameters in models.values()]
        cells = [f"{count:,}" for count in counts]
        if len(counts) == 2 and counts[0]:
            cells.append(f"{counts[1] / counts[0]:.1%}")
        table.add_row(part, *cells)
    return table


def _make_table(header: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def show_comparison(candidates: Sequence[Candidate], console: Console | None = None) -> None:
    """Print a table with a row for each model."""
    show_rows(summary_header(), summary_rows(candidates), console)


def show_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """Print a table whose first column holds words and whose others hold numbers."""
    table = _make_table(header)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    print_whole(table, console or Console(highlight=False))
