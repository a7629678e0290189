#!/usr/bin/env python
"""Tell whether an index of OLD's vectors keeps working when NEW embeds the queries.

    python scripts/check_index_compatibility.py BAAI/bge-m3 my_small_model --texts passages.txt

Both models have to give vectors of the same size. They do after pruning layers, units or heads
alone. A model with fewer hidden dimensions gives them if it was extracted with --keep-dimension.
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
    parser.add_argument("old", help="model that embedded the passages of the index")
    parser.add_argument("new", help="model that is to embed the queries")
    parser.add_argument(
        "--texts", nargs="+", required=True, metavar="FILE", help="passages, one text a line"
    )
    parser.add_argument(
        "--queries", nargs="+", metavar="FILE", help="queries (default: some of the passages)"
    )
    parser.add_argument(
        "--limit", type=int, default=10_000, help="passages at most (default: %(default)s)"
    )
    parser.add_argument("--max-length", type=int, help="cut texts at this many tokens")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a batch")
    parser.add_argument("--device", help="torch device (default: the best there is)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    args = parser.parse_args(argv)
    longest = 1 if args.max_length is None else args.max_length
    if min(args.limit, args.batch_size, longest) < 1:
        parser.error("--limit, --batch-size and --max-length must be above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Embed, compare, print."""
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.evaluation.encoders import check_model_name, load_encoder
    from bge_pruning.evaluation.index_compatibility import compare_index, describe_compatibility
    from bge_pruning.utils.devices import default_device
    from bge_pruning.utils.files import refuse_existing, write_json
    from bge_pruning.utils.typed_records import IndexRecord

    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)
    for name in (args.old, args.new):
        check_model_name(name)
    passages = read_texts(args.texts, args.limit)
    queries = read_texts(args.queries, args.limit) if args.queries else passages[::10]
    options = (args.device or default_device(), args.max_length, args.batch_size)
    old, new = load_encoder(args.old, *options), load_encoder(args.new, *options)
    result = compare_index(old, new, passages, queries, progress=sys.stderr.isatty())
    record = IndexRecord(old=args.old, new=args.new, **result)
    print("\n".join(describe_compatibility(record)))
    if args.output is not None:
        write_json(record.as_dict(), args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
