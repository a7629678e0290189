#!/usr/bin/env python
"""Score a model on similarity and retrieval beside its baseline and two floors; measure its speed.

    python scripts/evaluate_model.py experiments/results/half --baseline BAAI/bge-m3 \
        --sts data/sts/stsb-en-test.csv --retrieval my/collection --modes dense sparse all \
        --output experiments/results/half/evaluation.json

Models are folders or hub names in the sentence-transformers layout.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bge_pruning.cli import run_command
from bge_pruning.utils.console import show_evaluation
from bge_pruning.utils.evaluation import (
    collect_versions,
    evaluate,
    refuse_existing,
    write_json,
)


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
        "--sts", nargs="+", default=[], metavar="FILE", help="sentence1,sentence2,score (0 to 5)"
    )
    parser.add_argument(
        "--retrieval", nargs="+", default=[], metavar="DIR", help="collections in BEIR layout"
    )
    parser.add_argument(
        "--split", default="test", help="judgements of the collections (default: %(default)s)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["dense"],
        metavar="MODE",
        help="of retrieval: dense, sparse, colbert, dense+sparse, all (default: dense)",
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
    args = parser.parse_args(argv)
    if not args.sts and not args.retrieval:
        parser.error("nothing to evaluate on: give --sts, --retrieval or both")
    return args


def read_tasks(files: Sequence[str]) -> dict[str, tuple[list[str], list[str], list[float]]]:
    """The pairs of each file, under the file's stem."""
    from bge_pruning.datasets.sts_dataloader import read_sts_tasks

    tasks = read_sts_tasks(files)
    return {name: (p.sentences1, p.sentences2, p.scores) for name, p in tasks.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args, sys.argv[1:] if argv is None else argv))


def read_collections(args: argparse.Namespace) -> list[Any]:
    """The collections as tasks, read before any long work."""
    from bge_pruning.evaluation.tasks import beir_task

    return [beir_task(folder, args.split) for folder in args.retrieval]


def similarity(args: argparse.Namespace) -> dict[str, Any]:
    """Scores of the STS files, parameters and speed."""
    return evaluate(
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


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """The same without STS files: parameters alone."""
    from bge_pruning.utils.model_analysis import count_parameters

    def count(name: str | None) -> dict[str, int] | None:
        return count_parameters(name) if name and Path(name).is_dir() else None

    return {
        "model": args.model,
        "baseline": args.baseline,
        "tasks": [],
        "parameters": {"model": count(args.model), "baseline": count(args.baseline)},
        "speed": None,
        "seed": args.seed,
        "versions": collect_versions(),
    }


def retrieval(args: argparse.Namespace, collections: Sequence[Any]) -> list[dict[str, Any]]:
    """Scores of the collections in every mode."""
    import torch

    from bge_pruning.evaluation.retrieval import evaluate_retrieval
    from bge_pruning.models.pretrained import load_base_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate_retrieval(
        load_base_model(args.model),
        load_base_model(args.baseline) if args.baseline else None,
        collections,
        args.modes,
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=device,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )


def run(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Evaluate, write and show."""
    refuse_existing([args.output], overwrite=args.overwrite)
    collections = read_collections(args)
    result = similarity(args) if args.sts else describe(args)
    if collections:
        result["tasks"] += retrieval(args, collections)
    result["command"] = shlex.join(["python", "scripts/evaluate_model.py", *words])
    write_json(result, args.output, overwrite=args.overwrite)
    from rich.console import Console

    show_evaluation(result, Console(highlight=False))


if __name__ == "__main__":
    sys.exit(main())
