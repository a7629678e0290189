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
from typing import Any

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
    from bge_pruning.datasets.sts_dataloader import read_sts

    tasks = {}
    for file in files:
        if (task := Path(file).stem) in tasks:
            raise ValueError(
                f"two --sts files are called {task}. To fix, rename one: the name is the task's."
            )
        pairs = read_sts(file)
        tasks[task] = (pairs.sentences1, pairs.sentences2, pairs.scores)
    return tasks


def show(result: dict[str, Any]) -> None:
    """Prints the scores, and under them parameters and speed."""
    from rich.console import Console
    from rich.table import Table

    names = list(result["tasks"][0].get("also", {}))
    table = Table("task", title="cosine Spearman (dense)")
    for column in (
        "baseline",
        *names,
        "model",
        "random weights",
        "word embeddings",
        "kept",
        "kept above floor",
    ):
        table.add_column(column, justify="right")
    for task in result["tasks"]:
        floors = task["floors"]
        values = [task["baseline"], *(task["also"][name] for name in names), task["value"]]
        values += [floors["random_weights"], floors["word_embeddings"]]
        shares = [task["retention"], task["retention_above_floor"]]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        table.add_row(
            task["task"], *cells, *("-" if share is None else f"{share:.1%}" for share in shares)
        )
    console = Console()
    console.print(table)
    for which, counts in result["parameters"].items():
        if counts:
            console.print(
                f"{which}: " + ", ".join(f"{part} {count:,}" for part, count in counts.items())
            )
    if result["speed"]:
        latency, throughput = (
            result["speed"]["latency_ms"],
            result["speed"]["throughput_texts_per_s"],
        )
        console.print(
            f"one text: {latency['model']['median']:.1f} ms (baseline "
            f"{latency['baseline']['median']:.1f} ms); texts per second: "
            f"{throughput['model']:.0f} (baseline {throughput['baseline']:.0f}), "
            f"{throughput['ratio']:.2f} times"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parse_args(argv)
    try:
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
        result["command"] = shlex.join(
            ["python", "scripts/evaluate_model.py", *(sys.argv[1:] if argv is None else argv)]
        )
        write_json(result, args.output, overwrite=args.overwrite)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
