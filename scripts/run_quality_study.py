#!/usr/bin/env python
"""Run a grid of methods, sizes and seeds, and write what each keeps as a table and a picture.

    python scripts/run_quality_study.py configs/quality/study.yaml
    python scripts/run_quality_study.py configs/quality/study.yaml --only method=l0 size=50pct

Run again, it goes on where it was stopped. Run several times at once, say on a GPU that one process
does not fill, the processes share the cells (on a file system with locks). Every finished cell is a
file under cells in the results folder of the study; the table, the picture and summary.json beside
them are made of these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("study", type=Path, help="YAML file, see configs/quality/study.yaml")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUES",
        help="run a part: method=, size= or seed= with values separated by commas",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing; write the report of what is there"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="run cells again that were finished with another configuration",
    )
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Run what is not finished, and write the report of all that is."""
    from bge_pruning.reports.study_report import write_study_report
    from bge_pruning.workflows.study_file import read_study

    study = read_study(args.study)
    if not args.report_only:
        from bge_pruning.workflows.quality_study import run_study

        if not run_study(study, args.only, args.overwrite):
            print("all cells are being run by other processes, which will write the report")
            return
    print(f"wrote {write_study_report(study.results)}")


if __name__ == "__main__":
    sys.exit(main())
