#!/usr/bin/env python
"""Score a model on STS files beside its baseline and two floors, and measure its speed.

    python scripts/evaluate_model.py experiments/results/half --baseline BAAI/bge-m3 \
        --sts data/sts/stsb-en-test.csv --output experiments/results/half/evaluation.json

Models are folders or hub names in the sentence-transformers layout.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command
from bge_pruning.utils.console import show_evaluation
from bge_pruning.utils.evaluation import evaluate, refuse_existing, write_json


def named_model(text: str) -> tuple[str, str]:
    """``NAME=FOLDER`` as a pair."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or hub name of the model to judge")
    parser.add_argument(
        "--baseline", help="the unpruned model; without it there is no retention and no speed"
    )
    parser.add_argument(
        "--sts", nargs="+", required=True, metavar="FILE", help="sentence1,sentence2,score (0 to 5)"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        type=named_model,
        metavar="NAME=FOLDER",
        help="one more model to score, such as the pruned one before recovery; may be repeated",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="texts in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="cut texts at this many tokens (default: the model's own limit)",
    )
    parser.add_argument(
        "--device", help="torch device, such as cpu or cuda:0 (default: the best there is)"
    )
    parser.add_argument(
        "--no-speed", action="store_true", help="do not measure latency and throughput"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random-weights floor (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file if it exists"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def read_tasks(files: Sequence[str]) -> dict[str, tuple[list[str], list[str], list[float]]]:
    """The pairs of each file, under the file's stem."""
    from bge_pruning.datasets.sts_dataloader import read_sts_tasks

    tasks = read_sts_tasks(files)
    return {name: (p.sentences1, p.sentences2, p.scores) for name, p in tasks.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args, sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Evaluate, write and show."""
    refuse_existing([args.output], overwrite=args.overwrite)
    result = evaluate(
        args.model,
        args.baseline,
        read_tasks(args.sts),
        also=dict(args.also),
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=args.device,
        speed=not args.no_speed,
        seed=args.seed,
    )
    result["command"] = shlex.join(["python", "scripts/evaluate_model.py", *words])
    write_json(result, args.output, overwrite=args.overwrite)
    from rich.console import Console

    show_evaluation(result, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
