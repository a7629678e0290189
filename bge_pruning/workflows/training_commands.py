"""Command lines that train or prepare a training: pipeline, family, shape, the small example."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.config.shipped import split_arguments
from bge_pruning.model_io.example_models import (
    DEFAULT_SENTENCES,
    EXAMPLE_MODELS,
    M3_SMALL,
    MINILM,
    ExampleModel,
    prepare,
)
from bge_pruning.utils.guard import say
from bge_pruning.workflows import options as opt

ONLY = "one step: choose what stays by a baseline, without training, and write pruned_model"


def _check_pipeline(args: argparse.Namespace) -> Iterator[str]:
    if args.only:
        return
    if args.overwrite:
        yield "--overwrite needs --only cut; a whole pipeline has overwrite=true"
    yield from opt.check_tasks(args)


@opt.command(
    opt.CONFIG,
    *opt.TASKS,
    opt.value("--only", ONLY, choices=("cut",)),
    opt.flag("--overwrite", "of --only cut: replace a model that is there"),
    check=_check_pipeline,
    overrides=True,
    example="my.yaml seed=1 --sts data/sts/stsb-en-test.csv",
)
def pipeline(args: argparse.Namespace) -> None:
    """Prune, extract, recover, evaluate and report in one command."""
    if args.only:
        _cut(args)
        return
    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.pipeline import run_pipeline
    from bge_pruning.workflows.stages import EvaluationPlan

    evaluation = run_pipeline(*split_arguments(args.config), EvaluationPlan.of(args))
    if evaluation:  # on the first rank
        show_evaluation(evaluation)


def _cut(args: argparse.Namespace) -> None:
    """Cut where a recovery finds the model; the log says what was cut."""
    from bge_pruning.config.load import load_config, pruned_model_folder
    from bge_pruning.workflows.baselines import cut_baseline

    config = load_config(*split_arguments(args.config))
    output = pruned_model_folder(config)
    cut_baseline(config, output, args.overwrite)
    say(f"wrote {output}")


REPLACE = "train new heads where the base model has some (model.replace_heads=true)"


@opt.command(
    opt.CONFIG,
    opt.value(
        "--colbert-dim",
        "size of a multi-vector (model.colbert_dim; default: hidden size)",
        type=int,
    ),
    opt.flag("--replace", REPLACE),
    overrides=True,
    example="m3_small/heads --colbert-dim 128",
)
def heads(args: argparse.Namespace) -> None:
    """Give an encoder BGE-M3's sparse and multi-vector heads, trained on its frozen states."""
    from bge_pruning.config.load import load_config
    from bge_pruning.reports.console import show_rows
    from bge_pruning.train import show_plan
    from bge_pruning.workflows.heads import check_new_heads, score_rows, train_heads

    paths, overrides = split_arguments(args.config)
    if args.colbert_dim is not None:
        overrides.append(f"model.colbert_dim={args.colbert_dim}")
    if args.replace:
        overrides.append("model.replace_heads=true")
    implied = ["model.freeze_encoder=true", "model.init_missing_heads=true", "stage=prune"]
    config = load_config(paths, [*implied, *overrides])
    if config.dry_run:
        check_new_heads(config)
        show_plan(config)
        return
    record = train_heads(config, shlex.join(["bge-pruning", "heads", *args.words]))
    if record is None:  # on the other ranks
        return
    if record.after.ndcg_at_10:
        show_rows(*score_rows(record))
    say(f"loss     {record.loss['first']:.3f} > {record.loss['last']:.3f}")
    say(f"model    {config.results_folder}/model")


DENSITIES = "shares of the encoder's parameters to keep (default: 0.75 0.6 0.5)"


@opt.command(
    opt.listed("--densities", DENSITIES, "SHARE", type=float, default=[0.75, 0.6, 0.5]),
    opt.value(
        "--run", "a finished pruning run to take the gates of (default: prune now)", type=Path
    ),
    opt.CONFIG,
    *opt.TASKS,
    check=opt.check_tasks,
    overrides=True,
    example="my.yaml --densities 0.75 0.5 --sts data/sts/stsb-en-test.csv",
)
def family(args: argparse.Namespace) -> None:
    """Make several sizes from one pruning run, each cut from the next larger one and trained on."""
    from bge_pruning.reports.comparison import read_candidates
    from bge_pruning.reports.console import show_comparison
    from bge_pruning.workflows.family import export_family
    from bge_pruning.workflows.stages import EvaluationPlan

    plan = EvaluationPlan.of(args)
    folders = export_family(*split_arguments(args.config), args.densities, plan, args.run)
    if os.environ.get("RANK", "0") == "0":
        found = read_candidates([f"{folder.name}={folder}" for folder in folders])
        show_comparison(found.candidates)
        say("models   " + " ".join(f"{folder}/model" for folder in folders))


@opt.command(
    opt.CONFIG,
    opt.flag("--all", "measure every shape of that size"),
    *opt.OUTPUT,
    overrides=True,
    example="minilm/quickstart model.l0_module.target_density=0.5",
)
def shape(args: argparse.Namespace) -> None:
    """Say which shape of a size keeps most, by cutting and fitting each, without training."""
    from bge_pruning.config.load import load_config
    from bge_pruning.reports.console import show_rows
    from bge_pruning.workflows.shape_search import search_rows, search_shapes, summarise

    config = load_config(*split_arguments(args.config))
    opt.check_output(args)
    search = search_shapes(config, args.all)
    opt.write_output(args, search.as_dict())
    show_rows(*search_rows(search))
    say(summarise(search))


@dataclass(frozen=True)
class Example:
    """A pruning of a small real model that one command runs.

    Attributes:
        model: What it needs prepared.
        judged_by: Arguments of :class:`bge_pruning.workflows.stages.EvaluationPlan`.
    """

    config: str
    model: ExampleModel
    judged_by: Mapping[str, Any]

    def files(self) -> list[str]:
        """The files and folders that it is judged by."""
        news = [
            path.format(language=language)
            for path, pairs in self.judged_by.get("parallel", {}).items()
            for language in {part for pair in pairs for part in pair.split("-")}
        ]
        return [*self.judged_by["sts"], *self.judged_by.get("retrieval", ()), *sorted(news)]


NEWS = "data/sentences/newstest2019-{language}.txt.gz"
STS = "data/sts/stsb-{}.csv".format
QUICKSTART = Example("configs/minilm/quickstart.yaml", MINILM, {"sts": [STS("en-test")]})
# No text of these tests is trained on, and no translation of one.
MULTILINGUAL = Example(
    "configs/m3_small/quickstart.yaml",
    M3_SMALL,
    {
        "sts": [STS("en-test"), STS("de-dev"), STS("zh-dev")],
        "retrieval": ["data/mteb/scifact", "data/mteb/qed-nq-en"],
        "parallel": {NEWS: ["de-en", "en-zh", "ar-fr", "hi-es", "ja-ru"]},
        "modes": ["dense", "sparse", "colbert", "all"],
        "max_length": 128,
        "before_recovery": False,
    },
)


@opt.command(
    opt.flag("--multilingual", "prune a BGE-M3 in small, in many languages: 25 minutes"),
    opt.value("overrides", "key=value on top of its configuration", nargs="*"),
    overrides=True,
    example="seed=1",
)
def quickstart(args: argparse.Namespace) -> None:
    """Prune a real small model to half of its encoder on a CPU and compare it with the original."""
    from bge_pruning.config.load import load_config

    example = MULTILINGUAL if args.multilingual else QUICKSTART
    for name in (example.config, *example.files()):
        if not Path(name).exists():
            raise FileNotFoundError(
                f"{name}: no such file. The quickstart reads the repository's data, which are not "
                f"installed with the package. To fix, clone the repository and run it there."
            )
    # This command may replace what it made before; whoever runs the configuration has to say so.
    overrides = ["overwrite=true", *args.overrides]
    # Wrong arguments are refused before the model is prepared.
    config = load_config([example.config], overrides)
    results = config.results_folder
    prepare(example.model)
    precision = "bf16" if config.precision == "amp_bf16" else "fp32"
    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.pipeline import run_pipeline
    from bge_pruning.workflows.stages import EvaluationPlan

    evaluation = run_pipeline(
        [example.config], overrides, EvaluationPlan(**example.judged_by, precision=precision)
    )
    show_evaluation(evaluation)
    say(f"model    {results}/model\nreport   {results}/report.html")


PLACES = " or ".join(str(model.output) for model in EXAMPLE_MODELS.values())
FIT = "CSV without header, sentence1,sentence2,score, to fit minilm's sparse head on"
PREPARATION = (
    opt.value("--output", f"folder to make (default: {PLACES})", type=Path),
    opt.value("--sentences", f"{FIT} (default: {DEFAULT_SENTENCES})", type=Path),
    opt.flag("--without-heads", "no sparse and no multi-vector head: dense vectors only"),
    opt.flag("--overwrite", "replace an earlier conversion"),
)


def _check_preparation(args: argparse.Namespace) -> Iterator[str]:
    if args.sentences and (args.without_heads or getattr(args, "model", MINILM.key) != MINILM.key):
        yield "--sentences needs minilm with heads: no other head is fitted on them"


def _prepare(key: str, args: argparse.Namespace) -> None:
    # Read when transformers is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sentences, heads = args.sentences or DEFAULT_SENTENCES, not args.without_heads
    prepare(EXAMPLE_MODELS[key], args.output, sentences, heads=heads, overwrite=args.overwrite)


@opt.command(
    opt.value("model", "model to prepare", choices=tuple(EXAMPLE_MODELS)),
    *PREPARATION,
    check=_check_preparation,
    example="m3-small",
)
def prepare_model(args: argparse.Namespace) -> None:
    """Prepare a small real model: English (minilm), or BGE-M3 in small (m3-small)."""
    _prepare(args.model, args)


@opt.command(
    *PREPARATION,
    check=_check_preparation,
    example="--output experiments/checkpoints/minilm-xlmr",
)
def prepare_minilm(args: argparse.Namespace) -> None:
    """Prepare the small English model: the same as prepare-model minilm."""
    _prepare(MINILM.key, args)


@opt.command(
    opt.value("url", "address or path of a .tar.gz file"),
    opt.value("folder", "folder to make", type=Path),
    opt.value("--sha256", "checksum that the archive must have", metavar="HEX"),
    slow=False,
    example="https://huggingface.co/datasets/Shitao/bge-m3-data/resolve/main/bge-m3-data.tar.gz "
    "my/bge-m3",
)
def fetch_data(args: argparse.Namespace) -> None:
    """Fetch an archive of training data and unpack it while it is read, file by file.

    The folder appears when every file is there. After a kill, the same command keeps the files that
    are whole.
    """
    from bge_pruning.datasets.archives import fetch_archive

    count = fetch_archive(args.url, args.folder, args.sha256)
    say(f"wrote {args.folder}, {count} files")
