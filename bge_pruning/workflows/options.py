"""How a function becomes a command line, and the options that several commands have."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bge_pruning.config.names import HELD_OUT
from bge_pruning.config.shipped import CONFIG_HELP, KEYS, split_arguments
from bge_pruning.utils.files import refuse_existing, write_json
from bge_pruning.utils.guard import CommandLine, run_command, say

# Yields what is wrong with parsed arguments; the first of it ends the program as a usage error.
Check = Callable[[argparse.Namespace], Iterator[str]]


@dataclass(frozen=True)
class Option:
    """An option, or a positional argument; argparse's ``add_argument`` takes the ``settings``."""

    name: str
    settings: dict[str, Any]
    group: str | None = None


def value(name: str, text: str | None = None, **settings: Any) -> Option:
    """An option with one value, and ``text`` as its help."""
    return Option(name, {"help": text, **settings})


def flag(name: str, text: str) -> Option:
    """An option without a value."""
    return value(name, text, action="store_true")


def listed(name: str, text: str | None = None, metavar: str = "FILE", **settings: Any) -> Option:
    """An option with one or more values, none by default."""
    return value(name, text, **{"nargs": "+", "default": [], "metavar": metavar, **settings})


def grouped(title: str, *options: Option) -> tuple[Option, ...]:
    """Options under a title of their own in the help."""
    return tuple(replace(each, group=title) for each in options)


def command(
    *options: Option,
    example: str,
    check: Check | None = None,
    overrides: bool = False,
    slow: bool = True,
) -> Callable[[Callable[[argparse.Namespace], None]], Callable[..., int]]:
    """Make a command line of a function of parsed arguments; its docstring is the help.

    The arguments have one more attribute, ``words``: the command line as it was given. With
    ``overrides``, the positional list takes ``key=value`` from anywhere between the options. If
    ``slow``, the libraries take seconds to load, and a line says so.
    """

    def make(work: Callable[[argparse.Namespace], None]) -> Callable[..., int]:
        def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
            parser = CommandLine(prog, work.__doc__, example, KEYS if overrides else {})
            places: dict[str | None, Any] = {None: parser}
            for each in options:
                if each.group not in places:
                    places[each.group] = parser.add_argument_group(each.group)
                places[each.group].add_argument(each.name, **each.settings)
            words = sys.argv[1:] if argv is None else argv
            args = parser.read(_options_first(words, options) if overrides else words)
            args.words = words
            for problem in check(args) if check else ():
                parser.error(problem)
            return run_command(lambda: work(args), slow)

        main.__doc__ = work.__doc__
        return main

    return make


def _options_first(words: Sequence[str], options: Sequence[Option]) -> list[str]:
    """The options with their values, then ``--`` and the other words, in their order.

    A configuration or a ``key=value`` is no value of an option that takes several.
    """
    settings = {option.name: option.settings for option in options}
    ours, others, rest = [], [], deque(words)
    while rest:
        word = rest.popleft()
        if word == "--":
            others += rest
            break
        if not word.startswith("-"):
            others.append(word)
            continue
        ours.append(word)
        several, is_flag = (settings.get(word, {}).get(key) for key in ("nargs", "action"))
        if several == "+":
            while rest and not rest[0].startswith("-") and not _is_configuration(rest[0]):
                ours.append(rest.popleft())
        elif word in settings and is_flag != "store_true" and rest:
            ours.append(rest.popleft())
    return [*ours, "--", *others] if others else ours


def _is_configuration(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or bool(split_arguments([word])[1])


CONFIG = value("config", CONFIG_HELP, nargs="+")
DEVICE = value("--device", "torch device (default: %(default)s)", default="cpu")

# The JSON file that a command may write beside what it prints.
OUTPUT = (
    value("--output", "JSON file to write", type=Path),
    flag("--overwrite", "replace the output file"),
)
# Prompts of all models instead of those that their files name.
PROMPT = "written before each %s (default: as the model's files say)"
PROMPTS = (
    value("--query-prompt", PROMPT % "query", metavar="TEXT"),
    value("--document-prompt", PROMPT % "passage", metavar="TEXT"),
)
# What a model is evaluated on, and how.
STS = "files of sentence1,sentence2,score (0 to 5), or names such as STSBenchmark"
RETRIEVAL = "folders in BEIR layout, or names such as SciFact"
PARALLEL = (
    "line-parallel files, with {language} in the path, and pairs of languages such as de-en: the "
    "lines of the first search those of the second; may be repeated"
)
LINES = "lines of those files, FIRST:LAST as in Python, : for all (default: -400:, the last 400)"
MODES = "dense, sparse, colbert, dense+sparse, all (default: dense)"
CUT = "cut texts at this many tokens"
PRECISION = "of the layers: fp32, or bf16 where the device is faster with it (default: fp32)"
TASKS = (
    listed("--sts", STS, "TASK", action="extend"),
    listed("--retrieval", RETRIEVAL, "TASK", action="extend"),
    value("--split", "judgements of the folders (default: test, or the only ones)"),
    listed("--parallel", PARALLEL, "PATH PAIR", action="append"),
    value("--lines", LINES, metavar="FIRST:LAST", default=HELD_OUT),
    listed("--modes", MODES, "MODE", default=["dense"]),
    value("--max-length", f"{CUT} (default: the model's own limit)", type=int),
    value("--precision", PRECISION, choices=("fp32", "bf16"), default="fp32"),
    *PROMPTS,
)
HUB = grouped(
    "Hugging Face hub",
    value("--push-to-hub", "upload the folder as owner/name", metavar="NAME"),
    flag("--private", "make that repository private"),
)


def given_prompts(args: argparse.Namespace) -> dict[str, str]:
    """What :data:`PROMPTS` were given, by the role of a text."""
    given = {"query": args.query_prompt, "passage": args.document_prompt}
    return {role: prompt for role, prompt in given.items() if prompt is not None}


def check_output(args: argparse.Namespace) -> None:
    """Refuse an existing file before the work begins."""
    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)


def write_output(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the JSON file if it was asked for."""
    if args.output is not None:
        write_json(result, args.output, overwrite=args.overwrite)
        say(f"wrote {args.output}")


def check_tasks(args: argparse.Namespace) -> Iterator[str]:
    """Something has to be evaluated on; a mode that is named twice counts once."""
    if not (args.sts or args.retrieval or args.parallel):
        yield "nothing to evaluate on: give --sts, --retrieval or --parallel"
    if alone := [words[0] for words in args.parallel if len(words) < 2]:
        yield f"--parallel {alone[0]}: expected a path and pairs of languages such as de-en"
    args.modes = list(dict.fromkeys(args.modes))


def check_hub(args: argparse.Namespace) -> Iterator[str]:
    """Only what is uploaded can be private."""
    if args.private and not args.push_to_hub:
        yield "--private needs --push-to-hub"


def above_zero(message: str, *names: str) -> Check:
    """A check that numbers, or lists of them, are above 0 where they are given."""

    def check(args: argparse.Namespace) -> Iterator[str]:
        values = (getattr(args, name) for name in names)
        numbers = [n for v in values for n in (v if isinstance(v, list) else [v])]
        if min(n for n in numbers if n is not None) <= 0:
            yield f"{message} must be above 0"

    return check
