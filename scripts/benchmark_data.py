#!/usr/bin/env python
"""Padding and rows per second of each source of a configuration, with and without length grouping.

python scripts/benchmark_data.py configs/minilm/quickstart.yaml configs/training/mixed.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import run_command, split_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value")
    parser.add_argument("--batches", type=int, default=20, help="of each source (default: 20)")
    args = parser.parse_args(argv)
    if args.batches < 1:
        parser.error(f"--batches {args.batches} is not above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure and print the table."""
    from bge_pruning.config import load_config
    from bge_pruning.data_benchmark import measure_grouping, render_speeds

    config = load_config(*split_arguments(args.config))
    print(render_speeds(measure_grouping(config, args.batches)))


if __name__ == "__main__":
    sys.exit(main())
