#!/usr/bin/env python
"""What int8 costs a model with each way to quantise it: similarity to float32, size, speed.

python scripts/benchmark_int8.py MODEL --sts data/sts/stsb-en-test.csv

The folder must hold onnx/model.onnx; it stays as it is.
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
    parser.add_argument("model", type=Path, help="model folder with onnx/model.onnx")
    parser.add_argument("--sts", required=True, type=Path, help="file of sentence1,sentence2,score")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of speed")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from bge_pruning.datasets.sts_dataloader import read_sts
    from bge_pruning.evaluation.onnx_encoder import OnnxEncoder
    from bge_pruning.export.int8_loss import measure_int8
    from bge_pruning.export.onnx_export import FOLDER, MODEL
    from bge_pruning.export.onnx_quantize import CANDIDATES, describe_loss, quantised

    found = read_sts(args.sts)
    pairs = (found.sentences1, found.sentences2, found.scores)
    for name, settings in CANDIDATES.items():
        with quantised(args.model, settings) as path:
            float32 = OnnxEncoder(args.model / FOLDER / MODEL)
            loss = measure_int8(OnnxEncoder(path), float32, pairs, args.rounds)
            size = path.stat().st_size / 1e6
        lowest = {output: round(row["min"], 4) for output, row in loss["cosine"].items()}
        print(f"{name}: {size:.1f} MB, {describe_loss(loss)}; lowest cosines {lowest}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
