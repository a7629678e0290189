#!/usr/bin/env python
"""Write the model of a run as an ordinary, smaller model folder, and validate it.

python scripts/extract_pruned_model.py experiments/checkpoints/quickstart my_small_model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint) or checkpoint")
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument(
        "--best", action="store_true", help="the run's best checkpoint (evaluation.keep_best)"
    )
    args = parser.parse_args(argv)

    def command() -> None:
        from bge_pruning.export.extract import extract

        extract(args.run, args.output, args.overwrite, args.best)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
