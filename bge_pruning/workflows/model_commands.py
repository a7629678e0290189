"""Command lines about one model: extract it, evaluate it, and compare its vectors with an index."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bge_pruning.cli import command_words
from bge_pruning.config.schema import ExportConfig, missing_export_options
from bge_pruning.utils.files import evaluation_files, refuse_existing, write_json
from bge_pruning.utils.guard import run_command, say

# How tables call the models that are always there.
TAKEN = ("model", "original", "baseline")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """The JSON file that a command may write beside what it prints."""
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")


def check_output(args: argparse.Namespace) -> None:
    """Refuse an existing file before the work begins."""
    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)


def write_output(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the JSON file if it was asked for."""
    if args.output is not None:
        write_json(result, args.output, overwrite=args.overwrite)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what a model is evaluated on, and how."""
    for option, what in (
        ("--sts", "files of sentence1,sentence2,score (0 to 5), or names such as STSBenchmark"),
        ("--retrieval", "folders in BEIR layout, or names such as SciFact"),
    ):
        parser.add_argument(
            option, action="extend", nargs="+", default=[], metavar="TASK", help=what
        )
    parser.add_argument(
        "--split", default="test", help="judgements of the folders (default: %(default)s)"
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["dense"],
        metavar="MODE",
        help="dense, sparse, colbert, dense+sparse, all (default: dense)",
    )


def check_task_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if there is no task; modes are named once."""
    if not args.sts and not args.retrieval:
        parser.error("nothing to evaluate on: give --sts, --retrieval or both")
    args.modes = list(dict.fromkeys(args.modes))


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the folder goes."""
    group = parser.add_argument_group("Hugging Face hub")
    group.add_argument("--push-to-hub", metavar="NAME", help="upload the folder as owner/name")
    group.add_argument("--private", action="store_true", help="make that repository private")


def check_hub_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if there is nothing that could be private."""
    if args.private and not args.push_to_hub:
        parser.error("--private needs --push-to-hub")


def _upload(folder: Path, args: argparse.Namespace) -> None:
    from bge_pruning.export.hub_upload import push_to_hub

    if args.push_to_hub:
        say(f"uploaded to {push_to_hub(folder, args.push_to_hub, args.private)}")


def _check_upload(args: argparse.Namespace) -> None:
    """Refuse an upload that cannot work before the work begins."""
    from bge_pruning.export.hub_upload import check_hub_access

    if args.push_to_hub:
        check_hub_access(args.push_to_hub)


def extract(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the model of a run as an ordinary, smaller model folder, and validate it."""
    parser = argparse.ArgumentParser(prog=prog, description=extract.__doc__)
    parser.add_argument("run", type=Path, help="run folder (its newest checkpoint) or checkpoint")
    parser.add_argument("output", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument(
        "--best", action="store_true", help="the run's best checkpoint (evaluation.keep_best)"
    )
    _add_export_arguments(parser)
    _add_vocabulary_arguments(parser)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    for option, needed in missing_export_options(vars(args)).items():
        parser.error(f"{_flag(option)} needs {' or '.join(map(_flag, needed))}")
    if args.vocabulary_size is not None and args.vocabulary_size < 1:
        parser.error("--vocabulary-size must be above 0")
    check_hub_arguments(parser, args)
    return run_command(lambda: _extract(args))


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
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


def _add_vocabulary_arguments(parser: argparse.ArgumentParser) -> None:
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
        type=_language_list,
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


def _language_list(text: str) -> list[str]:
    """Names between commas.

    Raises:
        ArgumentTypeError: If there is none, as where a variable of the shell is empty: it would
            mean all tokens.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"'{text}' names no language, expected e.g. de,en,fr")
    return names


def _flag(option: str) -> str:
    """The option as it is typed."""
    return "--" + option.replace("_", "-")


def _extract(args: argparse.Namespace) -> None:
    from bge_pruning.export.extract import extract, read_options

    options = read_options(**{f.name: getattr(args, f.name) for f in fields(ExportConfig)})
    _check_upload(args)
    extract(args.run, args.output, args.overwrite, args.best, options)
    _upload(args.output, args)


def evaluate(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Score a model on similarity and retrieval beside its baseline and two floors."""
    parser = argparse.ArgumentParser(prog=prog, description=evaluate.__doc__)
    parser.add_argument("model", help="the model to judge")
    parser.add_argument(
        "--baseline", help="the unpruned model; without it there is no retention and no speed"
    )
    add_task_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_card_arguments(parser)
    add_hub_arguments(parser)
    args = parser.parse_args(argv)
    _check_evaluation_arguments(parser, args)
    words = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _evaluate(args, words))


def _add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is evaluated, and where the result goes."""
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        type=_named_model,
        metavar="NAME=FOLDER",
        help="one more model to score, such as the pruned one before recovery; may be repeated",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="texts in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        help="cut texts at this many tokens (default: the model's own limit)",
    )
    parser.add_argument(
        "--device", help="torch device, such as cpu or cuda:0 (default: the best there is)"
    )
    parser.add_argument("--no-speed", action="store_true", help="do not measure speed and memory")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random floor and the intervals (default: 0)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output files if they exist"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write (needed for an evaluation)")


def _add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What the model card is made of."""
    group = parser.add_argument_group("model card of an extracted model")
    group.add_argument(
        "--card",
        action="store_true",
        help="write README.md again, with the scores; without tasks nothing is evaluated",
    )
    group.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="what an earlier evaluation wrote"
    )
    group.add_argument(
        "--index", type=Path, metavar="FILE", help="what check_index_compatibility.py wrote"
    )


def _check_evaluation_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error if there is nothing to do, or options do not go together."""
    for name in ("evaluation", "index", "push_to_hub"):
        if getattr(args, name) and not args.card:
            parser.error(f"{_flag(name)} needs --card")
    check_hub_arguments(parser, args)
    if args.card and not (args.sts or args.retrieval or args.output or args.baseline or args.also):
        return
    check_task_arguments(parser, args)
    if args.output is None:
        parser.error("the following arguments are required: --output")
    if args.evaluation:
        parser.error("--evaluation is of an earlier evaluation: leave it or the tasks out")
    names = [name for name, _ in args.also]
    for name in names:
        if name in TAKEN or names.count(name) > 1:
            parser.error(f"--also: two models would be called {name}; choose another name")


def _named_model(text: str) -> tuple[str, str]:
    """``NAME=FOLDER`` as a pair."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def _evaluate(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Evaluate if there are tasks, then write the card if it is asked for."""
    if not args.card:
        _score(args, words)
        return
    from bge_pruning.export.model_card import write_model_card

    _check_upload(args)
    evaluation = args.evaluation
    if args.output is not None:
        write_model_card(Path(args.model), None, args.index)  # what is refused is refused now
        _score(args, words)
        evaluation = args.output
    say(f"wrote {write_model_card(Path(args.model), evaluation, args.index)}")
    _upload(Path(args.model), args)


def _score(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Evaluate, write and show."""
    refuse_existing(evaluation_files(args.output), overwrite=args.overwrite)
    from rich.console import Console

    from bge_pruning.evaluation.evaluate import evaluate, write_evaluation
    from bge_pruning.evaluation.tasks import find_tasks
    from bge_pruning.reports.console import show_evaluation

    tasks = find_tasks(args.sts, args.retrieval, args.split)
    result = evaluate(
        args.model,
        args.baseline,
        tasks,
        args.modes,
        also=dict(args.also),
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=args.device,
        speed=not args.no_speed,
        seed=args.seed,
        progress=sys.stderr.isatty(),
    )
    result.command = shlex.join([*command_words("evaluate_model"), *words])
    write_evaluation(result, args.output, overwrite=args.overwrite)
    show_evaluation(result, Console(highlight=False))


def index(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Tell whether an index of OLD's vectors keeps working when NEW embeds the queries."""
    parser = argparse.ArgumentParser(prog=prog, description=index.__doc__)
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
    add_output_arguments(parser)
    args = parser.parse_args(argv)
    longest = 1 if args.max_length is None else args.max_length
    if min(args.limit, args.batch_size, longest) < 1:
        parser.error("--limit, --batch-size and --max-length must be above 0")
    return run_command(lambda: _index(args))


def _index(args: argparse.Namespace) -> None:
    """Embed, compare, print."""
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.evaluation.encoders import check_model_name, load_encoder
    from bge_pruning.evaluation.index_compatibility import compare_index, describe_compatibility
    from bge_pruning.utils.environment import default_device
    from bge_pruning.utils.records import IndexRecord

    check_output(args)
    for name in (args.old, args.new):
        check_model_name(name)
    passages = read_texts(args.texts, args.limit)
    queries = read_texts(args.queries, args.limit) if args.queries else passages[::10]
    options = (args.device or default_device(), args.max_length, args.batch_size)
    old, new = load_encoder(args.old, *options), load_encoder(args.new, *options)
    result = compare_index(old, new, passages, queries, progress=sys.stderr.isatty())
    record = IndexRecord(old=args.old, new=args.new, **result)
    say("\n".join(describe_compatibility(record)))
    write_output(args, record.as_dict())
