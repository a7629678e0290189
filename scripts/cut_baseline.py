#!/usr/bin/env python
"""Choose what stays by a baseline, without training, and write the cut model; train it on after.

    python scripts/cut_baseline.py configs/minilm/quickstart.yaml method=magnitude
    python scripts/train_pruning.py configs/minilm/quickstart.yaml method=magnitude stage=recover

The model is written to pruned_model in the results folder, where a recovery finds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import run_command, split_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Cut and say what was cut."""
    from bge_pruning.config.load import load_config, pruned_model_folder
    from bge_pruning.export.extraction import describe
    from bge_pruning.workflows.baselines import cut_baseline

    config = load_config(*split_arguments(args.config))
    output = pruned_model_folder(config)
    info = cut_baseline(config, output, args.overwrite)
    print(f"wrote {output}: {describe(info)}")


if __name__ == "__main__":
    sys.exit(main())
