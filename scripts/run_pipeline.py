#!/usr/bin/env python
"""Prune, extract, recover, evaluate and report in one command.

python scripts/run_pipeline.py configs/minilm/quickstart.yaml --sts data/sts/stsb-en-test.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import run_command, split_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value")
    parser.add_argument(
        "--sts", nargs="+", required=True, help="scored sentence pairs to evaluate the result on"
    )
    args = parser.parse_intermixed_args(argv)
    paths, overrides = split_arguments(args.config)
    return run_command(lambda: run_and_show(paths, overrides, args.sts))


def run_and_show(paths: list[str], overrides: list[str], sts: list[str]) -> None:
    """Run the pipeline and print its result."""
    from rich.console import Console

    from bge_pruning.pipeline import run_pipeline
    from bge_pruning.utils.console import show_evaluation

    evaluation = run_pipeline(paths, overrides, sts)
    if evaluation:
        show_evaluation(evaluation, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
