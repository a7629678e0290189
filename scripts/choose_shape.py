#!/usr/bin/env python
"""Say which shape of a size keeps most, by cutting and fitting each, without training.

    python scripts/choose_shape.py configs/minilm/quickstart.yaml
    python scripts/choose_shape.py my.yaml "model.l0_module={target_model: null, target_speedup: 2}"

The size is the target of the configuration: a share or a number of the encoder's parameters, a
speed-up, or that of the shape which it names. All depths are measured at the full width, then the
depths around the best one at smaller widths, for as long as that helps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command, split_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value")
    parser.add_argument("--all", action="store_true", help="measure every shape of that size")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    from rich.console import Console

    from bge_pruning.config.load import load_config
    from bge_pruning.reports.console import show_rows
    from bge_pruning.utils.files import refuse_existing, write_json
    from bge_pruning.workflows.shape_search import search_rows, search_shapes, summarise

    config = load_config(*split_arguments(args.config))
    if args.output:
        refuse_existing([args.output], overwrite=args.overwrite)
    search = search_shapes(config, args.all)
    if args.output:
        write_json(search.as_dict(), args.output, overwrite=args.overwrite)
    show_rows(*search_rows(search), Console(highlight=False))
    print(summarise(search))


if __name__ == "__main__":
    sys.exit(main())
