#!/usr/bin/env python
"""Write the model of a run as an ordinary, smaller model folder, and validate it.

python scripts/extract_pruned_model.py experiments/checkpoints/quickstart my_small_model --onnx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_pruning.cli import run_command

if TYPE_CHECKING:
    from bge_pruning.export.extract import ExtractOptions


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
        "scores, which FlagEmbedding and vLLM load without arguments (default: %(default)s)",
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
        default="",
        metavar="LIST",
        help="and those of the sentences shipped for these languages, such as de,en,fr",
    )
    group.add_argument(
        "--vocabulary-size", type=int, metavar="N", help="of them the N most frequent"
    )
    group.add_argument(
        "--report-on", nargs="+", default=[], metavar="FILE", help="tell what these texts lose"
    )


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the folder goes."""
    group = parser.add_argument_group("Hugging Face hub")
    group.add_argument("--push-to-hub", metavar="NAME", help="upload the folder as owner/name")
    group.add_argument("--private", action="store_true", help="make that repository private")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if options do not go together."""
    args.languages = [name.strip() for name in args.languages.split(",") if name.strip()]
    texts = args.keep_vocabulary_from or args.languages
    needs = {
        "--fit-texts": (args.fit_texts, args.keep_dimension, "--keep-dimension"),
        "--int8-sts": (args.int8_sts, args.onnx_int8, "--onnx-int8"),
        "--private": (args.private, args.push_to_hub, "--push-to-hub"),
        "--vocabulary-size": (
            args.vocabulary_size is not None,
            texts,
            "--keep-vocabulary-from or --languages: texts say which tokens are frequent",
        ),
        "--report-on": (args.report_on, texts, "--keep-vocabulary-from or --languages"),
    }
    for option, (given, other, name) in needs.items():
        if given and not other:
            parser.error(f"{option} needs {name}")


def run(args: argparse.Namespace) -> None:
    """Extract, and upload if asked."""
    from bge_pruning.export.extract import extract

    extract(args.run, args.output, args.overwrite, args.best, read_options(args))


def read_options(args: argparse.Namespace) -> ExtractOptions:
    """The options of the command line."""
    from bge_pruning.datasets.sts_dataloader import read_sts
    from bge_pruning.export.extract import ExtractOptions
    from bge_pruning.export.vocabulary_texts import VocabularyRequest
    from bge_pruning.models.precision import DTYPES

    vocabulary = pairs = None
    if args.int8_sts:
        found = read_sts(args.int8_sts)
        pairs = (found.sentences1, found.sentences2, found.scores)
    if args.keep_vocabulary_from or args.languages:
        vocabulary = VocabularyRequest(
            tuple(args.keep_vocabulary_from),
            tuple(args.languages),
            args.vocabulary_size,
            tuple(args.report_on),
        )
    return ExtractOptions(
        dtype=DTYPES[args.dtype],
        square_head=args.colbert_dim == "hidden",
        keep_dimension=args.keep_dimension,
        fit_texts=tuple(args.fit_texts),
        vocabulary=vocabulary,
        onnx=args.onnx,
        onnx_int8=args.onnx_int8,
        int8_pairs=pairs,
    )


if __name__ == "__main__":
    sys.exit(main())
