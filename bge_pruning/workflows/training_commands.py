"""Command lines that train or prepare a training: pipeline, family, shape, the small example."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.config.shipped import CONFIG_HELP, split_arguments
from bge_pruning.model_io import minilm
from bge_pruning.utils.guard import run_command, say
from bge_pruning.workflows.model_commands import (
    add_output_arguments,
    add_task_arguments,
    check_output,
    check_task_arguments,
    write_output,
)

QUICKSTART = "configs/minilm/quickstart.yaml"
QUICKSTART_STS = "data/sts/stsb-en-test.csv"


def pipeline(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prune, extract, recover, evaluate and report in one command."""
    parser = argparse.ArgumentParser(prog=prog, description=pipeline.__doc__)
    parser.add_argument("config", nargs="+", help=CONFIG_HELP)
    add_task_arguments(parser)
    parser.add_argument(
        "--only",
        choices=("cut",),
        help="one step: choose what stays by a baseline, without training, and write pruned_model",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="of --only cut: replace a model that is there"
    )
    args = parser.parse_intermixed_args(argv)
    if args.only:
        return run_command(lambda: _cut(args))
    if args.overwrite:
        parser.error("--overwrite needs --only cut; a whole pipeline has overwrite=true")
    check_task_arguments(parser, args)
    return run_command(lambda: _pipeline(args))


def _cut(args: argparse.Namespace) -> None:
    """Cut where a recovery finds the model, and say what was cut."""
    from bge_pruning.config.load import load_config, pruned_model_folder
    from bge_pruning.export.extraction import describe
    from bge_pruning.workflows.baselines import cut_baseline

    config = load_config(*split_arguments(args.config))
    output = pruned_model_folder(config)
    info = cut_baseline(config, output, args.overwrite)
    say(f"wrote {output}: {describe(info)}")


def _pipeline(args: argparse.Namespace) -> None:
    """Run the pipeline and print its result, on the rank that has it."""
    from rich.console import Console

    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.pipeline import run_pipeline
    from bge_pruning.workflows.stages import EvaluationPlan

    evaluation = run_pipeline(*split_arguments(args.config), EvaluationPlan.of(args))
    if evaluation:
        show_evaluation(evaluation, Console(highlight=False))


def family(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Make several sizes from one pruning run, each cut from the next larger one and trained on."""
    parser = argparse.ArgumentParser(prog=prog, description=family.__doc__)
    parser.add_argument(
        "--densities",
        nargs="+",
        type=float,
        default=[0.75, 0.6, 0.5],
        metavar="SHARE",
        help="shares of the encoder's parameters to keep (default: 0.75 0.6 0.5)",
    )
    parser.add_argument(
        "--run", type=Path, help="a finished pruning run to take the gates of (default: prune now)"
    )
    parser.add_argument("config", nargs="+", help=CONFIG_HELP)
    add_task_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    check_task_arguments(parser, args)
    return run_command(lambda: _family(args))


def _family(args: argparse.Namespace) -> None:
    """Make the family and print its comparison."""
    from rich.console import Console

    from bge_pruning.reports.comparison import read_candidates
    from bge_pruning.reports.console import show_comparison
    from bge_pruning.workflows.family import export_family
    from bge_pruning.workflows.stages import EvaluationPlan

    plan = EvaluationPlan.of(args)
    folders = export_family(*split_arguments(args.config), args.densities, plan, args.run)
    if os.environ.get("RANK", "0") == "0":
        candidates, _ = read_candidates([f"{folder.name}={folder}" for folder in folders])
        show_comparison(candidates, Console(highlight=False))
        say("models   " + " ".join(f"{folder}/model" for folder in folders))


def shape(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Say which shape of a size keeps most, by cutting and fitting each, without training."""
    parser = argparse.ArgumentParser(prog=prog, description=shape.__doc__)
    parser.add_argument("config", nargs="+", help=CONFIG_HELP)
    parser.add_argument("--all", action="store_true", help="measure every shape of that size")
    add_output_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    return run_command(lambda: _shape(args))


def _shape(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    from rich.console import Console

    from bge_pruning.config.load import load_config
    from bge_pruning.reports.console import show_rows
    from bge_pruning.workflows.shape_search import search_rows, search_shapes, summarise

    config = load_config(*split_arguments(args.config))
    check_output(args)
    search = search_shapes(config, args.all)
    write_output(args, search.as_dict())
    show_rows(*search_rows(search), Console(highlight=False))
    say(summarise(search))


def quickstart(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prune a real small model to half of its encoder on a CPU and compare it with the original."""
    parser = argparse.ArgumentParser(prog=prog, description=quickstart.__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value on top of " + QUICKSTART)
    args = parser.parse_args(argv)
    return run_command(lambda: _quickstart(args.overrides))


def _quickstart(overrides: list[str]) -> None:
    """Prepare the model, run the pipeline, print the result and where it lies."""
    from rich.console import Console

    from bge_pruning.config.load import load_config
    from bge_pruning.reports.console import show_evaluation
    from bge_pruning.workflows.pipeline import run_pipeline
    from bge_pruning.workflows.stages import EvaluationPlan

    for name in (QUICKSTART, QUICKSTART_STS):
        if not Path(name).is_file():
            raise FileNotFoundError(
                f"{name}: no such file. The quickstart reads the repository's data, which are not "
                f"installed with the package. To fix, clone the repository and run it there."
            )
    results = load_config([QUICKSTART], overrides).results_folder  # refuses wrong arguments first
    minilm.prepare(minilm.DEFAULT_OUTPUT, minilm.DEFAULT_SENTENCES)
    evaluation = run_pipeline([QUICKSTART], overrides, EvaluationPlan([QUICKSTART_STS]))
    show_evaluation(evaluation, Console(highlight=False))
    say(f"model    {results}/model\nreport   {results}/report.html")


def prepare_minilm(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prepare the small real model of the examples: all-MiniLM-L6-v2 in BGE-M3's layout."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=prepare_minilm.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=minilm.DEFAULT_OUTPUT, help="folder to make")
    parser.add_argument(
        "--sentences",
        type=Path,
        default=minilm.DEFAULT_SENTENCES,
        help="CSV without header, sentence1,sentence2,score, to fit the sparse head on",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    args = parser.parse_args(argv)
    # Read when transformers is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return run_command(lambda: _prepare_minilm(args))


def _prepare_minilm(args: argparse.Namespace) -> None:
    minilm.prepare(args.output, args.sentences, args.overwrite)
