#!/usr/bin/env python
"""Prune, extract, recover, evaluate and report in one command.

python scripts/run_pipeline.py configs/minilm/quickstart.yaml --sts data/sts/stsb-en-test.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import (
    add_task_arguments,
    check_task_arguments,
    run_command,
    split_arguments,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value")
    add_task_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    check_task_arguments(parser, args)
    paths, overrides = split_arguments(args.config)
    return run_command(lambda: run_and_show(paths, overrides, args))


def run_and_show(paths: list[str], overrides: list[str], args: argparse.Namespace) -> None:
    """Run the pipeline and print its result."""
    from rich.console import Console

    from bge_pruning.pipeline import EvaluationPlan, run_pipeline
    from bge_pruning.utils.console import show_evaluation

    plan = EvaluationPlan(args.sts, args.retrieval, args.split, args.modes)
    evaluation = run_pipeline(paths, overrides, plan)
    if evaluation:
        show_evaluation(evaluation, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
