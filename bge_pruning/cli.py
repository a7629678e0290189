"""The command ``bge-pruning``: a subcommand for each script, loaded when it is called."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from bge_pruning.utils.guard import CommandLine

PROGRAM = "bge-pruning"
# A wheel brings no scripts; a clone has them beside the package.
SCRIPTS = Path(__file__).parents[1] / "scripts"


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        target: ``module:function``; the function takes the words after the command and the name of
            the program for its help, and returns the exit code.
        script: The script that runs the same function, or "".
    """

    target: str
    script: str
    summary: str


# By module: names with their scripts and summaries. A function is called as its command is.
_TABLE = {
    "model": {
        "extract": ("extract_pruned_model", "write the model of a run as a model folder"),
        "evaluate": ("evaluate_model", "score a model, or write its card again"),
        "index": ("check_index_compatibility", "tell whether an index keeps working"),
    },
    "training": {
        "pipeline": ("run_pipeline", "prune, extract, recover, evaluate and report"),
        "heads": ("train_heads", "give an encoder a sparse and a multi-vector head"),
        "family": ("export_family", "make several sizes from one run"),
        "shape": ("choose_shape", "say which shape of a size keeps most"),
        "quickstart": ("quickstart", "prune a small real model on a CPU"),
        "prepare-model": ("prepare_model", "make a small real model of the examples"),
        "fetch-data": ("", "fetch an archive of training data and unpack it"),
        "prepare-minilm": ("prepare_minilm", "the same as prepare-model minilm"),
    },
    "measurement": {
        "compare": ("compare_runs", "put evaluated models in a table and a picture"),
        "report": ("write_report", "write the report of a results or run folder"),
        "benchmark": ("benchmark_efficiency", "measure speed beside the original"),
        "benchmark-training": ("benchmark_training", "measure a step of pruning"),
        "study": ("run_quality_study", "run a grid of methods, sizes and seeds"),
    },
}
TRAINING = ("train_pruning", "train the gates (stage=recover: train on)")
COMMANDS = {"prune": Command("bge_pruning.train:main", *TRAINING)} | {
    name: Command(f"bge_pruning.workflows.{module}_commands:{name.replace('-', '_')}", *described)
    for module, commands in _TABLE.items()
    for name, described in commands.items()
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand of ``argv``, or of the process's own command line, and return its code."""
    name, *words = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name not in COMMANDS:
        return _answer(name)
    module, _, function = COMMANDS[name].target.partition(":")
    return getattr(import_module(module), function)(words, f"{PROGRAM} {name}")


def _answer(word: str) -> int:
    """Print help or version, or end with a usage error."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    description = "\n".join(
        [
            "Prune BGE-M3 and other XLM-RoBERTa embedders with learned gates.",
            *("", "commands:", *lines, "", f"{PROGRAM} COMMAND --help tells more."),
        ]
    )
    parser = CommandLine(PROGRAM, description, "prune bge_m3/target_60pct dry_run=true", {})
    parser.usage = f"{PROGRAM} COMMAND ..."
    parser.add_argument("--version", action="version", version=_version())
    parser.parse_known_args([word])
    if not word or word.startswith("-"):
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    fix = f"did you mean {close[0]}?" if close else f"choose from {', '.join(COMMANDS)}"
    parser.error(f"there is no command '{word}': {fix}")
    return 2


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{PROGRAM} {version('bge_pruning')}"
    except PackageNotFoundError:  # a clone on the path
        return f"{PROGRAM} (not installed)"


def command_words(script: str) -> list[str]:
    """How a script is called here: itself in a clone, the subcommand where there are no scripts."""
    if SCRIPTS.joinpath(f"{script}.py").is_file():
        return ["python", f"scripts/{script}.py"]
    name = next(name for name, command in COMMANDS.items() if command.script == script)
    return [PROGRAM, name]
