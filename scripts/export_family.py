#!/usr/bin/env python
"""Make several sizes from one pruning run, each cut from the next larger one and trained on.

    python scripts/export_family.py configs/minilm/quickstart.yaml --densities 0.75 0.6 0.5 \
        --sts data/sts/stsb-en-test.csv

The models lie in RESULTS-family/75pct/model and so on, with a comparison beside them. A call that
was interrupted goes on where it stopped if it is made again with autoresume=true overwrite=false.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import parse_pipeline_arguments, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--densities",
        nargs="+",
        type=float,
        default=[0.75, 0.6, 0.5],
        metavar="SHARE",
        help="shares of the encoder's parameters to keep (default: 0.75 0.6 0.5)",
    )
    parser.add_argument(
        "--run", type=Path, help="a finished pruning run to take the gates of (default: prune now)"
    )
    paths, overrides, args = parse_pipeline_arguments(parser, argv)
    return run_command(lambda: run(paths, overrides, args))


def run(paths: list[str], overrides: list[str], args: argparse.Namespace) -> None:
    """Make the family and print its comparison."""
    import os

    from rich.console import Console

    from bge_pruning.reports.comparison import read_candidates
    from bge_pruning.reports.console import show_comparison
    from bge_pruning.workflows.family import export_family
    from bge_pruning.workflows.pipeline import EvaluationPlan

    plan = EvaluationPlan.of(args)
    folders = export_family(paths, overrides, args.densities, plan, args.run)
    if os.environ.get("RANK", "0") == "0":
        candidates, _ = read_candidates([f"{folder.name}={folder}" for folder in folders])
        show_comparison(candidates, Console(highlight=False))
        print("models   " + " ".join(f"{folder}/model" for folder in folders))


if __name__ == "__main__":
    sys.exit(main())
