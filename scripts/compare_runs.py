#!/usr/bin/env python
"""Put several evaluated models in one table and one picture: quality against size and time.

    python scripts/compare_runs.py experiments/results/half experiments/results/small \
        --output experiments/results/comparison

A model is a results folder or an evaluation file, optionally as NAME=PATH. Those that have the same
name are runs of one thing with different seeds: their mean and range are shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command

FILES = ("comparison.json", "comparison.md", "pareto.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="+", metavar="[NAME=]PATH", help="evaluated models")
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Read, write and show."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from bge_pruning.utils.comparison import (
        describe_comparison,
        read_candidates,
        render_comparison,
        summary_header,
        summary_rows,
    )
    from bge_pruning.utils.console import print_whole
    from bge_pruning.utils.evaluation import refuse_existing, write_json, write_text
    from bge_pruning.utils.pareto_plot import plot_pareto

    written = [args.output / name for name in FILES]
    refuse_existing(written, overwrite=args.overwrite)
    candidates, keys = read_candidates(args.results)
    write_json(describe_comparison(candidates, keys), written[0], overwrite=args.overwrite)
    write_text(written[1], render_comparison(candidates, keys) + "\n![Pareto plot](pareto.png)\n")
    plot_pareto(candidates, written[2])
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(summary_header()):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in summary_rows(candidates):
        table.add_row(*(escape(cell) for cell in row))
    print_whole(table, Console(highlight=False))
    print(f"scores compared: {len(keys)}; written to {args.output}")


if __name__ == "__main__":
    sys.exit(main())
