#!/usr/bin/env python
"""Prune a real small model to half of its encoder on a CPU and compare it with the original.

python scripts/quickstart.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import run_command

CONFIG = "configs/minilm/quickstart.yaml"
STS = "data/sts/stsb-en-test.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value on top of " + CONFIG)
    args = parser.parse_args(argv)
    return run_command(lambda: quickstart(args.overrides))


def quickstart(overrides: list[str]) -> None:
    """Prepare the model, run the pipeline, print the result and where it lies."""
    from rich.console import Console

    from bge_pruning.config.load import load_config
    from bge_pruning.model_io.minilm import DEFAULT_OUTPUT, DEFAULT_SENTENCES, prepare
    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.pipeline import EvaluationPlan, run_pipeline

    results = load_config([CONFIG], overrides).results_folder  # refuses wrong arguments first
    prepare(DEFAULT_OUTPUT, DEFAULT_SENTENCES)
    evaluation = run_pipeline([CONFIG], overrides, EvaluationPlan([STS]))
    show_evaluation(evaluation, Console(highlight=False))
    print(f"model    {results}/model", f"report   {results}/report.html", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
