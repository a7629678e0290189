"""Command lines about one model: extract it, evaluate it, and compare its vectors with an index."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from bge_pruning.cli import command_words
from bge_pruning.config.checks import missing_export_options
from bge_pruning.config.schema import ExportConfig
from bge_pruning.reports.comparison import EVALUATION
from bge_pruning.utils.files import evaluation_files, refuse_existing
from bge_pruning.utils.guard import say
from bge_pruning.workflows import options as opt

# How tables call the models that are always there.
TAKEN = ("model", "original", "baseline")


def _upload(folder: Path, args: argparse.Namespace) -> None:
    from bge_pruning.export.hub_upload import push_to_hub

    if args.push_to_hub:
        say(f"uploaded to {push_to_hub(folder, args.push_to_hub, args.private)}")


def _check_upload(args: argparse.Namespace) -> None:
    """Refuse an upload that cannot work before the work begins."""
    from bge_pruning.export.hub_upload import check_hub_access

    if args.push_to_hub:
        check_hub_access(args.push_to_hub)


def _flag(name: str) -> str:
    """The option as it is typed."""
    return "--" + name.replace("_", "-")


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


def _check_extraction(args: argparse.Namespace) -> Iterator[str]:
    for name, needed in missing_export_options(vars(args)).items():
        yield f"{_flag(name)} needs {' or '.join(map(_flag, needed))}"
    if args.vocabulary_size is not None and args.vocabulary_size < 1:
        yield "--vocabulary-size must be above 0"
    yield from opt.check_hub(args)


COLBERT = (
    "size of a multi-vector: as in the source, or the new hidden size, with the same scores, which "
    "FlagEmbedding loads without colbert_dim (default: %(default)s)"
)
DIMENSION = "dense vectors in the source's dimensions, so that an existing index keeps working"
FIT = "texts to fit the map of --keep-dimension on (needs the source model)"
DTYPE = "precision of the weights (default: %(default)s)"
LANGUAGES = "and those of the sentences shipped for these languages, such as de,en,fr"
EXPORT = opt.grouped(
    "model",
    opt.value("--dtype", DTYPE, choices=("fp32", "fp16", "bf16"), default="fp32"),
    opt.value("--colbert-dim", COLBERT, choices=("keep", "hidden"), default="keep"),
    opt.flag("--keep-dimension", DIMENSION),
    opt.listed("--fit-texts", FIT),
    opt.flag("--onnx", "write onnx/model.onnx too"),
    opt.flag("--onnx-int8", "and onnx/model_quantized.onnx, for CPUs"),
    opt.value("--int8-sts", "scored pairs to measure the loss of --onnx-int8 on", metavar="FILE"),
    opt.flag("--int8-any-loss", "write it even if an output's mean cosine is below 0.95"),
)
VOCABULARY = opt.grouped(
    "vocabulary (default: all tokens)",
    opt.listed("--keep-vocabulary-from", "keep the tokens of these texts"),
    opt.value("--languages", LANGUAGES, metavar="LIST", type=_language_list, default=[]),
    opt.value("--vocabulary-size", "of them the N most frequent", metavar="N", type=int),
    opt.listed("--report-on", "tell what these texts lose"),
)


@opt.command(
    opt.value("run", "run folder (its newest checkpoint) or checkpoint", type=Path),
    opt.value("output", "folder to write; it must not exist", type=Path),
    opt.flag("--overwrite", "replace an existing folder"),
    opt.flag("--best", "the run's best checkpoint (evaluation.keep_best)"),
    *(*EXPORT, *VOCABULARY, *opt.HUB),
    check=_check_extraction,
    example="experiments/checkpoints/my-run my-model --dtype fp16 --onnx",
)
def extract(args: argparse.Namespace) -> None:
    """Write the model of a run as an ordinary, smaller model folder, and validate it."""
    from bge_pruning.export.extract import extract, read_options

    options = read_options(**{f.name: getattr(args, f.name) for f in fields(ExportConfig)})
    _check_upload(args)
    extract(args.run, args.output, args.overwrite, args.best, options)
    _upload(args.output, args)


def _named_model(text: str) -> tuple[str, str]:
    """``NAME=FOLDER`` as a pair."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def _check_evaluation(args: argparse.Namespace) -> Iterator[str]:
    """Something has to be done, with options that go together."""
    for name in ("evaluation", "index", "push_to_hub"):
        if getattr(args, name) and not args.card:
            yield f"{_flag(name)} needs --card"
    yield from opt.check_hub(args)
    tasks = (args.sts, args.retrieval, args.parallel)
    if args.card and not any((*tasks, args.output, args.baseline, args.also)):
        return
    yield from opt.check_tasks(args)
    args.output = args.output or default_output(args.model)
    if args.evaluation:
        yield "--evaluation is of an earlier evaluation: leave it or the tasks out"
    names = [name for name, _ in args.also]
    for name in names:
        if name in TAKEN or names.count(name) > 1:
            yield f"--also: two models would be called {name}; choose another name"


def default_output(model: str) -> Path:
    """``evaluation.json`` beside a model, in the folder of a run, or here for a name on the hub."""
    path = Path(model)
    is_run = path.is_dir() and not (path / "config.json").is_file()
    return (path if is_run else path.parent if path.exists() else Path()) / EVALUATION


ALSO = "one more model to score, such as the pruned one before recovery; may be repeated"
CARD = "write README.md again, with the scores; without tasks nothing is evaluated"
OPTIONS = (
    opt.value(
        "--also", ALSO, metavar="NAME=FOLDER", type=_named_model, action="append", default=[]
    ),
    opt.value("--batch-size", "texts in a batch (default: %(default)s)", type=int, default=32),
    opt.value("--device", "torch device, such as cpu or cuda:0 (default: the best there is)"),
    opt.flag("--no-speed", "do not measure speed and memory"),
    opt.value("--seed", "of the random floor and the intervals (default: 0)", type=int, default=0),
    opt.flag("--overwrite", "replace the output files if they exist"),
    opt.value("--output", "JSON file (default: evaluation.json beside the model)", type=Path),
)
MODEL_CARD = opt.grouped(
    "model card of an extracted model",
    opt.flag("--card", CARD),
    opt.value("--evaluation", "what an earlier evaluation wrote", metavar="FILE", type=Path),
    opt.value("--index", "what check_index_compatibility.py wrote", metavar="FILE", type=Path),
)


@opt.command(
    opt.value("model", "the model to judge"),
    opt.value("--baseline", "the unpruned model; without it there is no retention and no speed"),
    *(*opt.TASKS, *OPTIONS, *MODEL_CARD, *opt.HUB),
    check=_check_evaluation,
    example="my-model --baseline BAAI/bge-m3 --sts STSBenchmark --output evaluation.json",
)
def evaluate(args: argparse.Namespace) -> None:
    """Score a model on similarity and retrieval beside its baseline and two floors."""
    if not args.card:
        _score(args)
        return
    from bge_pruning.export.model_card import write_model_card

    _check_upload(args)
    evaluation = args.evaluation
    if args.output is not None:
        write_model_card(Path(args.model), None, args.index)  # what is refused is refused now
        _score(args)
        evaluation = args.output
    say(f"wrote {write_model_card(Path(args.model), evaluation, args.index)}")
    _upload(Path(args.model), args)


def _score(args: argparse.Namespace) -> None:
    """Evaluate, write and show."""
    refuse_existing(evaluation_files(args.output), overwrite=args.overwrite)
    from bge_pruning.evaluation.evaluate import evaluate, write_evaluation
    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.stages import EvaluationPlan

    names = "batch_size max_length precision device seed".split()
    options = {name: getattr(args, name) for name in names}
    result = evaluate(
        args.model,
        args.baseline,
        EvaluationPlan.of(args).tasks(),
        args.modes,
        also=dict(args.also),
        prompts=opt.given_prompts(args),
        speed=not args.no_speed,
        progress=sys.stderr.isatty(),
        **options,
    )
    result.command = shlex.join([*command_words("evaluate_model"), *args.words])
    write_evaluation(result, args.output, overwrite=args.overwrite)
    show_evaluation(result)
    say(f"wrote {' and '.join(map(str, evaluation_files(args.output)))}")


@opt.command(
    opt.value("old", "model that embedded the passages of the index"),
    opt.value("new", "model that is to embed the queries"),
    opt.listed("--texts", "passages, one text a line", required=True),
    opt.listed("--queries", "queries (default: some of the passages)"),
    *opt.PROMPTS,
    opt.value("--limit", "passages at most (default: %(default)s)", type=int, default=10_000),
    opt.value("--max-length", opt.CUT, type=int),
    opt.value("--batch-size", "texts in a batch", type=int, default=32),
    opt.value("--device", "torch device (default: the best there is)"),
    *opt.OUTPUT,
    check=opt.above_zero(
        "--limit, --batch-size and --max-length", "limit", "batch_size", "max_length"
    ),
    example="BAAI/bge-m3 my-model --texts passages.txt",
)
def index(args: argparse.Namespace) -> None:
    """Tell whether an index of OLD's vectors keeps working when NEW embeds the queries."""
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.evaluation.encoders import check_model_name, load_encoder
    from bge_pruning.evaluation.index_compatibility import compare_index, describe_compatibility
    from bge_pruning.utils.environment import default_device
    from bge_pruning.utils.records import IndexRecord

    opt.check_output(args)
    for name in (args.old, args.new):
        check_model_name(name)
    passages = read_texts(args.texts, args.limit)
    queries = read_texts(args.queries, args.limit) if args.queries else passages[::10]
    options = (args.device or default_device(), args.max_length, args.batch_size)
    options = (*options, opt.given_prompts(args))
    old, new = load_encoder(args.old, *options), load_encoder(args.new, *options)
    result = compare_index(old, new, passages, queries, progress=sys.stderr.isatty())
    record = IndexRecord(old=args.old, new=args.new, **result)
    say("\n".join(describe_compatibility(record)))
    opt.write_output(args, record.as_dict())
