#!/usr/bin/env python
"""Write report.md, its pictures and report.html from the files of a results or run folder.

python scripts/write_report.py experiments/results/half
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command
from bge_pruning.reports.report import MARKDOWN, write_report
from bge_pruning.utils.files import refuse_existing


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "results_folder",
        help="holds evaluation.json and what else the run wrote; a run folder works too",
    )
    parser.add_argument(
        "--command",
        action="append",
        default=[],
        help="a command that reproduces the run; may be repeated (default: those of commands.txt)",
    )
    parser.add_argument(
        "--run", type=Path, help="run folder, to copy what the report needs of it and its recovery"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Collect what the report needs, and write it."""
    if args.run is not None:
        from bge_pruning.training.run_report import collect_run

        results = Path(args.results_folder)
        refuse_existing([results / MARKDOWN], overwrite=args.overwrite)  # before inputs change
        collect_run(results, args.run)
    path = write_report(args.results_folder, commands=args.command, overwrite=args.overwrite)
    print(f"wrote {path} and {path.with_suffix('.html')}")


if __name__ == "__main__":
    sys.exit(main())
