#!/usr/bin/env python
"""Measure a pruning step beside a step of plain fine-tuning, on the same batches.

python scripts/benchmark_training.py experiments/checkpoints/minilm-xlmr \
        --texts data/sts/stsb-en-train.csv data/mteb/scifact-sample/corpus.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or hub name of the model to train")
    parser.add_argument(
        "--texts", nargs="+", required=True, metavar="FILE", help="texts of mixed lengths"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=256, help="cut texts here (default: %(default)s tokens)"
    )
    parser.add_argument(
        "--fixed-length", type=int, default=128, help="of the batches without padding"
    )
    parser.add_argument("--steps", type=int, default=12, help="of each kind (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    args = parser.parse_args(argv)
    numbers = (args.batch_size, args.max_length, args.fixed_length, args.steps)
    if min(numbers) < 1:
        parser.error("sizes, lengths and steps must be above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.models.pretrained import load_base_model
    from bge_pruning.training_benchmark import measure_training, summarise
    from bge_pruning.utils.evaluation import refuse_existing, write_json
    from bge_pruning.utils.training_cost import render_training

    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)
    texts = read_texts(args.texts, args.batch_size * args.steps)
    base = load_base_model(args.model)
    length = min(args.max_length, base.max_seq_length)
    tokens = tokenize(texts, build_tokenizer(base.tokenizer_files["tokenizer.json"], length))
    costs = measure_training(
        base,
        tokens,
        args.batch_size,
        min(args.fixed_length, length),
        args.steps,
        args.device,
        args.dtype == "bf16",
    )
    result = {"model": args.model, "device": args.device, **summarise(costs)}
    print(render_training(result))
    if args.output is not None:
        write_json(result, args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
