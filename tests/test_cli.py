"""The command ``bge-pruning``: help, version, wrong names, and what every subcommand shares."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from bge_pruning import cli
from bge_pruning.cli import COMMANDS, command_words, main

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


def ends(words: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code


def test_there_is_a_command_for_each_script():
    assert sorted(command.script for command in COMMANDS.values() if command.script) == SCRIPTS
    assert len(SCRIPTS) <= 16


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if command.script])
def test_a_script_and_its_command_run_the_same_function(name):
    module, _, function = COMMANDS[name].target.partition(":")
    called = getattr(import_module(module), function)
    assert list(inspect.signature(called).parameters) == ["argv", "prog"]
    imported = f"from {module} import {function}" + (" as main" if function != "main" else "")
    assert imported in (ROOT / "scripts" / f"{COMMANDS[name].script}.py").read_text().splitlines()


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_lists_every_command_in_a_line(words, capsys):
    assert ends(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.endswith(command.summary) and len(line) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_it(name, capsys):
    assert ends([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: bge-pruning {name} ")


@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_help_ends_with_an_example_that_can_be_run(name, capsys, monkeypatch):
    assert ends([*name.split(), "--help"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    program, *words = line.removeprefix("example: ").split()
    assert program == "bge-pruning" and words[0] == (name or "prune")
    for module in ("bge_pruning.train", "bge_pruning.workflows.options"):
        monkeypatch.setattr(f"{module}.run_command", lambda *_, **__: 7)  # it would run then
    assert main(words) == 7


def test_version(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"bge_pruning": "1.2.3"}.__getitem__)
    assert ends(["--version"]) == 0
    assert capsys.readouterr().out == "bge-pruning 1.2.3\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"name a command: prune, extract, "),
        (["--fast"], r"name a command: prune, extract, "),
        (["extrakt"], r"there is no command 'extrakt': did you mean extract\?"),
        (["configs/a.yaml"], r"there is no command 'configs/a\.yaml': choose from prune, extract,"),
    ],
)
def test_no_command_is_a_usage_error(words, message, capsys):
    assert ends(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"bge-pruning: error: {message}", err.splitlines()[-1])


def test_the_code_of_a_command_is_returned(capsys):
    assert main(["prune", "elephant.yaml"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: elephant.yaml: no such file. To fix, ")


LIGHT = """\
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from bge_pruning.cli import COMMANDS, main

for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
    with suppress(SystemExit), redirect_stdout(StringIO()):
        main(words)
heavy = {"torch", "transformers", "composer", "datasets", "mteb", "matplotlib", "numpy"}
print(sorted(heavy & set(sys.modules)))
"""


def test_no_help_loads_anything_heavy():
    """So it is there in a moment, in a fresh process."""
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_commands_are_written_as_they_can_be_called_here(monkeypatch, tmp_path):
    assert command_words("extract_pruned_model") == ["python", "scripts/extract_pruned_model.py"]
    monkeypatch.setattr(cli, "SCRIPTS", tmp_path)
    assert command_words("extract_pruned_model") == ["bge-pruning", "extract"]
