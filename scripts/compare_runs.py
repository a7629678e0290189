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
    from rich.console import Console

    from bge_pruning.reports.comparison_files import write_comparison
    from bge_pruning.reports.console import show_comparison

    candidates, keys = write_comparison(args.results, args.output, args.overwrite)
    show_comparison(candidates, Console(highlight=False))
    print(f"scores compared: {len(keys)}; written to {args.output}")


if __name__ == "__main__":
    sys.exit(main())
