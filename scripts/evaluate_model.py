#!/usr/bin/env python
"""Score a model on similarity and retrieval beside its baseline and two floors; measure its speed.

    python scripts/evaluate_model.py experiments/results/half --baseline BAAI/bge-m3 \
        --sts data/sts/stsb-en-test.csv --retrieval my/collection --modes dense sparse all \
        --output experiments/results/half/evaluation.json

A model is a folder, a run's folder or checkpoint, or a name on the Hugging Face hub. A task is a
file or folder, or the name that mteb has for it (STSBenchmark, STS17:en-de, SciFact), if there is a
network. Results go to the JSON file and to a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import add_task_arguments, check_task_arguments, run_command
from bge_pruning.reports.console import show_evaluation
from bge_pruning.utils.files import evaluation_files, refuse_existing

# How tables call the models that are always there.
TAKEN = ("model", "original", "baseline")


def named_model(text: str) -> tuple[str, str]:
    """``NAME=FOLDER`` as a pair."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="the model to judge")
    parser.add_argument(
        "--baseline", help="the unpruned model; without it there is no retention and no speed"
    )
    add_task_arguments(parser)
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
    parser.add_argument("--no-speed", action="store_true", help="do not measure speed and memory")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random floor and the intervals (default: 0)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output files if they exist"
    )
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    check_task_arguments(parser, args)
    names = [name for name, _ in args.also]
    for name in names:
        if name in TAKEN or names.count(name) > 1:
            parser.error(f"--also: two models would be called {name}; choose another name")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args, sys.argv[1:] if argv is None else argv))


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Evaluate, write and show."""
    refuse_existing(evaluation_files(args.output), overwrite=args.overwrite)
    from rich.console import Console

    from bge_pruning.evaluation.evaluate import evaluate, write_evaluation
    from bge_pruning.evaluation.tasks import find_tasks

    tasks = find_tasks(args.sts, args.retrieval, args.split)
    result = evaluate(
        args.model,
        args.baseline,
        tasks,
        args.modes,
        also=dict(args.also),
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=args.device,
        speed=not args.no_speed,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    result["command"] = shlex.join(["python", "scripts/evaluate_model.py", *words])
    write_evaluation(result, args.output, overwrite=args.overwrite)
    show_evaluation(result, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
