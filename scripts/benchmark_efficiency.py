#!/usr/bin/env python
"""Measure how fast a model is beside its original, and how much of the ideal speed-up that is.

    python scripts/benchmark_efficiency.py experiments/results/quickstart/model \
        --baseline experiments/checkpoints/minilm-xlmr --texts data/sts/stsb-en-test.csv

Before anything is pruned, a configuration stands for random weights of its target beside random
weights of its source; and a GPU and other runtimes are measured in the same way:

    python scripts/benchmark_efficiency.py configs/bge_m3/target_50pct.yaml --device cuda \
        --dtype bf16 --runtimes torch compile --lengths 16 128 512 8192 --output bench.json

The ideal is the ratio of floating-point operations. A ratio with far-apart quartiles, or of too few
turns, is printed with its spread, and not called reached or missed.
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
    parser.add_argument(
        "model", help="folder, hub name, ONNX file, or a configuration (.yaml): its target shape"
    )
    parser.add_argument(
        "--baseline", help="the same of the original (of a configuration: its source shape)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=("torch", "compile", "onnx"),
        help="PyTorch, torch.compile, ONNX Runtime (default: torch; onnx for an ONNX file)",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32], metavar="N")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 128, 512], metavar="T")
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="real lengths too")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each setting (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    args = parser.parse_args(argv)
    if min(*args.batch_sizes, *args.lengths, args.seconds) <= 0:
        parser.error("batch sizes, lengths and seconds must be above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.reports.efficiency_table import render_efficiency
    from bge_pruning.utils.files import refuse_existing, write_json
    from bge_pruning.workflows.efficiency_benchmark import (
        benchmark,
        choose_runtimes,
        find_candidates,
    )

    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)
    candidates = find_candidates(args.model, args.baseline)
    result = benchmark(
        candidates,
        choose_runtimes(candidates, args.runtimes),
        args.dtype,
        args.device,
        args.batch_sizes,
        args.lengths,
        read_texts(args.texts),
        args.seconds,
    )
    print(render_efficiency(result))
    if args.output is not None:
        write_json(result, args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
