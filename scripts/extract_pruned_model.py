#!/usr/bin/env python
"""Write the model of a run as an ordinary, smaller model folder, and validate it.

python scripts/extract_pruned_model.py experiments/checkpoints/quickstart my_small_model --onnx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bge_pruning.cli import run_command
from bge_pruning.config.schema import ExportConfig, missing_export_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint) or checkpoint")
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument(
        "--best", action="store_true", help="the run's best checkpoint (evaluation.keep_best)"
    )
    add_model_arguments(parser)
    add_vocabulary_arguments(parser)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return run_command(lambda: run(args))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What the model is written as."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="precision of the weights (default: %(default)s)",
    )
    group.add_argument(
        "--colbert-dim",
        choices=("keep", "hidden"),
        default="keep",
        help="size of a multi-vector: as in the source, or the new hidden size, with the same "
        "scores, which FlagEmbedding loads without colbert_dim (default: %(default)s)",
    )
    group.add_argument(
        "--keep-dimension",
        action="store_true",
        help="dense vectors in the source's dimensions, so that an existing index keeps working",
    )
    group.add_argument(
        "--fit-texts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts to fit the map of --keep-dimension on (needs the source model)",
    )
    group.add_argument("--onnx", action="store_true", help="write onnx/model.onnx too")
    group.add_argument(
        "--onnx-int8", action="store_true", help="and onnx/model_quantized.onnx, for CPUs"
    )
    group.add_argument(
        "--int8-sts", metavar="FILE", help="scored pairs to measure the loss of --onnx-int8 on"
    )


def add_vocabulary_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokens are kept."""
    group = parser.add_argument_group("vocabulary (default: all tokens)")
    group.add_argument(
        "--keep-vocabulary-from",
        nargs="+",
        default=[],
        metavar="FILE",
        help="keep the tokens of these texts",
    )
    group.add_argument(
        "--languages",
        type=language_list,
        default=[],
        metavar="LIST",
        help="and those of the sentences shipped for these languages, such as de,en,fr",
    )
    group.add_argument(
        "--vocabulary-size", type=int, metavar="N", help="of them the N most frequent"
    )
    group.add_argument(
        "--report-on", nargs="+", default=[], metavar="FILE", help="tell what these texts lose"
    )


def language_list(text: str) -> list[str]:
    """Names between commas.

    Raises:
        ArgumentTypeError: If there is none, as where a variable of the shell is empty: it would
            mean all tokens.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"'{text}' names no language, expected e.g. de,en,fr")
    return names


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the folder goes."""
    group = parser.add_argument_group("Hugging Face hub")
    group.add_argument("--push-to-hub", metavar="NAME", help="upload the folder as owner/name")
    group.add_argument("--private", action="store_true", help="make that repository private")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if options do not go together."""
    for option, needed in missing_export_options(vars(args)).items():
        parser.error(f"{flag(option)} needs {' or '.join(map(flag, needed))}")
    if args.vocabulary_size is not None and args.vocabulary_size < 1:
        parser.error("--vocabulary-size must be above 0")
    if args.private and not args.push_to_hub:
        parser.error("--private needs --push-to-hub")


def flag(option: str) -> str:
    """The option as it is typed."""
    return "--" + option.replace("_", "-")


def run(args: argparse.Namespace) -> None:
    """Extract, and upload if asked."""
    from bge_pruning.export.extract import extract, read_options
    from bge_pruning.export.hub_upload import check_hub_access, push_to_hub

    options = read_options(**{f.name: getattr(args, f.name) for f in fields(ExportConfig)})
    if args.push_to_hub:
        check_hub_access(args.push_to_hub)
    extract(args.run, args.output, args.overwrite, args.best, options)
    if args.push_to_hub:
        print(f"uploaded to {push_to_hub(args.output, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    sys.exit(main())
