#!/usr/bin/env python
"""Memory and time of extracting a run of random weights, beside reading and writing its bytes.

python scripts/benchmark_extraction.py --config configs/bge_m3/target_60pct.yaml

Needs 8 GB of disk for a model of BGE-M3's size (16 GB with the optimizer's state). The checkpoint
is on the disk but not in memory when it is read, and written bytes are on the disk in the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--config",
        nargs="+",
        default=["configs/bge_m3/target_60pct.yaml"],
        help="YAML files, merged left to right, and key=value (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument(
        "--with-optimizer", action="store_true", help="a checkpoint with the optimizer's state"
    )
    parser.add_argument("--rounds", type=int, default=3, help="extractions (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    from bge_pruning.cli import split_arguments
    from bge_pruning.config import load_config
    from bge_pruning.extraction_benchmark import measure, render

    config = load_config(*split_arguments(args.config))
    found = measure(
        config, args.folder, args.dtype, args.with_optimizer, args.rounds, report=_report
    )
    print(render(found))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
