#!/usr/bin/env python
"""Prune, extract, recover, evaluate and report in one command.

python scripts/run_pipeline.py configs/minilm/quickstart.yaml --sts data/sts/stsb-en-test.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import parse_pipeline_arguments, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    paths, overrides, args = parse_pipeline_arguments(parser, argv)
    return run_command(lambda: run_and_show(paths, overrides, args))


def run_and_show(paths: list[str], overrides: list[str], args: argparse.Namespace) -> None:
    """Run the pipeline and print its result."""
    from rich.console import Console

    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.pipeline import EvaluationPlan, run_pipeline

    plan = EvaluationPlan.of(args)
    evaluation = run_pipeline(paths, overrides, plan)
    if evaluation:
        show_evaluation(evaluation, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
