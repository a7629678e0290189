"""What a report is made from: the files of a results folder or a run folder, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import yaml

from bge_pruning.config.yaml_text import check_yaml
from bge_pruning.reports.history import Series, collect_series
from bge_pruning.utils.record_schemas import CONFIG_FILE, EVALUATION, HISTORY_ROW, PRUNING
from bge_pruning.utils.records import TEXT, Each, Schema, check_record, parse_json, read_record

COMMANDS = "commands.txt"
VERSIONS = "versions.json"
REMOVE = "remove the line"


@dataclass
class Inputs:
    """What a folder holds; ``None`` or empty for a file that is not there.

    Attributes:
        name: Of the folder.
        evaluation: ``evaluation.json``.
        pruning: ``pruning.json``.
        series: Curves of ``metrics.jsonl``.
        recovery: Curves of ``metrics-recovery.jsonl``.
        gates: Open probabilities by axis, of ``gates.npz``.
        kept: Booleans of the same shapes, of ``gates.npz``.
        config_text: ``config.yaml``.
        config: The same, parsed.
        versions: ``versions.json``: package versions of the run.
        commands: Commands that reproduce the run.
        missing: Names of the files that are not there.
    """

    name: str
    evaluation: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    series: Series = field(default_factory=dict)
    recovery: Series = field(default_factory=dict)
    gates: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_inputs(folder: Path, commands: Sequence[str] = ()) -> Inputs:
    """Reads what is there.

    Args:
        folder: Results folder or run folder.
        commands: Commands that reproduce the run; ``commands.txt`` is then not read.

    Returns:
        The content of the files.

    Raises:
        FileNotFoundError: If there is neither an evaluation, nor an extraction, nor a history.
        ValueError: If a file cannot be read; the message names it.
    """
    inputs = Inputs(name=folder.resolve().name, commands=list(commands))
    readers: dict[str, Callable[[Path], None]] = {
        "evaluation.json": lambda path: setattr(inputs, "evaluation", _read_json(path, EVALUATION)),
        "pruning.json": lambda path: setattr(inputs, "pruning", _read_json(path, PRUNING)),
        "metrics.jsonl": lambda path: setattr(inputs, "series", _read_series(path)),
        "metrics-recovery.jsonl": lambda path: setattr(inputs, "recovery", _read_series(path)),
        "gates.npz": lambda path: _read_gates(path, inputs),
        "config.yaml": lambda path: _read_config(path, inputs),
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            read(folder / name)
        else:
            inputs.missing.append(name)
    needed = ("evaluation.json", "pruning.json", "metrics.jsonl")
    if set(needed) <= set(inputs.missing):
        raise FileNotFoundError(
            f"{folder} holds neither {' nor '.join(needed)}. To fix, give the folder of a run, or "
            "the results folder of one that was extracted or evaluated."
        )
    if (folder / VERSIONS).is_file():
        inputs.versions = _read_json(folder / VERSIONS, Each(TEXT))
    _find_commands(folder, inputs)
    return inputs


def _find_commands(folder: Path, inputs: Inputs) -> None:
    """Commands given to the function, or else recorded in the folder, or else in the evaluation."""
    if not inputs.commands and (folder / COMMANDS).is_file():
        lines = _read_text(folder / COMMANDS).splitlines()
        inputs.commands = [line for line in lines if line.strip()]
    elif not inputs.commands:
        inputs.missing.append(COMMANDS)
        recorded = (inputs.evaluation or {}).get("command")
        inputs.commands = [recorded] if recorded else []


def _read_json(path: Path, schema: Schema) -> dict[str, Any]:
    return read_record(path, schema, "write it again")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8. To fix, write it again.") from error


def _read_series(path: Path) -> Series:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            rows.append(parse_json(line, where, REMOVE))
            check_record(rows[-1], HISTORY_ROW, where, REMOVE)
    return collect_series(rows)


def _read_gates(path: Path, inputs: Inputs) -> None:
    import numpy as np

    try:
        # Opened here: np.load leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, OSError, TypeError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path} holds no arrays ({error}). To fix, write it again.") from error
    inputs.gates = {name: array for name, array in content.items() if not name.endswith("_kept")}
    inputs.kept = {
        axis: content[f"{axis}_kept"] for axis in inputs.gates if f"{axis}_kept" in content
    }


def _read_config(path: Path, inputs: Inputs) -> None:
    inputs.config_text = _read_text(path)
    try:
        check_yaml(inputs.config_text)
        content = yaml.safe_load(inputs.config_text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not YAML ({reason}). To fix, write it again.") from error
    check_record(content, CONFIG_FILE, str(path), "write it again")
    inputs.config = content
