#!/usr/bin/env python
"""Write the model card of an extracted model again, with scores, and push the model to the hub.

    python scripts/write_model_card.py my_small_model --evaluation results.json \
        --push-to-hub me/my-small-model --private

The files are copied into the folder.
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
    parser.add_argument("model", type=Path, help="folder of an extracted model")
    parser.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="what evaluate_model.py wrote about it"
    )
    parser.add_argument(
        "--index", type=Path, metavar="FILE", help="what check_index_compatibility.py wrote"
    )
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="then upload the folder as this model, owner/name"
    )
    parser.add_argument(
        "--private", action="store_true", help="a model that is made on the hub is private"
    )
    args = parser.parse_args(argv)
    if args.private and not args.push_to_hub:
        parser.error("--private is about --push-to-hub, which is not there")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Write, upload, say where."""
    from bge_pruning.export.hub_upload import check_hub_access, push_to_hub
    from bge_pruning.export.model_card import write_model_card

    if args.push_to_hub:
        check_hub_access(args.push_to_hub)
    print(f"wrote {write_model_card(args.model, args.evaluation, args.index)}")
    if args.push_to_hub:
        print(f"uploaded to {push_to_hub(args.model, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    sys.exit(main())
