#!/usr/bin/env python
"""Measure how fast a model is beside its original, and how much of the ideal speed-up that is.

    python scripts/benchmark_efficiency.py experiments/results/quickstart/model \
        --baseline experiments/checkpoints/minilm-xlmr --texts data/sts/stsb-en-test.csv

The ideal is the ratio of floating-point operations. A ratio with far-apart quartiles is printed
with them, and not called reached or missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bge_pruning.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder, hub name or ONNX file")
    parser.add_argument("--baseline", help="the same of the original")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
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
    from bge_pruning.evaluation.efficiency import measure_efficiency, prepare
    from bge_pruning.evaluation.encoders import check_model_name, load_encoder
    from bge_pruning.utils.efficiency_table import render_efficiency
    from bge_pruning.utils.evaluation import collect_versions, refuse_existing, write_json

    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)
    names = [args.model, *([args.baseline] if args.baseline else [])]
    for name in names:
        check_model_name(name)
    texts = read_texts(args.texts)
    encoders = [
        prepare(load_encoder(name, args.device), args.dtype, args.compile) for name in names
    ]
    found: dict[str, Any] = measure_efficiency(
        *(encoders if len(encoders) > 1 else [encoders[0], None]),
        args.batch_sizes,
        args.lengths,
        texts,
        args.seconds,
    )
    result = {
        **dict(zip(("model", "baseline"), names, strict=False)),
        "device": args.device,
        "dtype": args.dtype,
        "compiled": args.compile,
        **found,
        "versions": collect_versions(),
    }
    print(render_efficiency(result))
    if args.output is not None:
        write_json(result, args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
