#!/usr/bin/env python
"""Write the tables of speed in the documents from what the benchmarks measured.

    python scripts/benchmark_efficiency.py ... --output experiments/results/performance/NAME.json
    python scripts/benchmark_training.py ... --output experiments/results/performance/NAME.json
    python scripts/write_performance.py

A document holds the marks ``<!-- speed -->`` and ``<!-- end of speed -->``, and the same of
``steps``; what is between them is replaced. The README has the short tables.
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
    folder = Path("experiments/results/performance")
    parser.add_argument(
        "--results", type=Path, default=folder, help="folder of JSON files (default: %(default)s)"
    )
    parser.add_argument("--brief", type=Path, default=Path("README.md"), metavar="FILE")
    parser.add_argument("--full", type=Path, default=folder.with_suffix(".md"), metavar="FILE")
    parser.add_argument(
        "--check", action="store_true", help="change nothing, and fail if a table is not up to date"
    )
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Render, and write or compare."""
    from bge_pruning.utils.performance_tables import read_results, write_tables

    results = read_results(args.results)
    for path, brief in ((args.brief, True), (args.full, False)):
        changed = write_tables(path, results, brief, write=not args.check)
        if changed and args.check:
            raise ValueError(
                f"{path}: its tables are not those of {args.results}. To fix, run "
                f"scripts/write_performance.py."
            )


if __name__ == "__main__":
    sys.exit(main())
