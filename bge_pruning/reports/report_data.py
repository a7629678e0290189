"""What a report is made from: the files of a results folder, and logged numbers as curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import yaml

from bge_pruning.config.load import check_yaml
from bge_pruning.utils.record_schemas import CONFIG_FILE, EVALUATION, HISTORY_ROW, PRUNING
from bge_pruning.utils.records import TEXT, Each, Schema, check_record, parse_json, read_record
from bge_pruning.utils.visualization import AXIS_TITLES

# Batches and values of each key.
Series = dict[str, tuple[list[int], list[float]]]
MAX_POINTS = 400  # more are not told apart on paper, and make a heavy file
NOT_TASK = re.compile(r"total|lagrang|sparsity|pruning|constraint")
LOGGED_SCORE = re.compile(
    r"eval/(?P<task>.+)/(?:(?P<mode>sparse|colbert|dense\+sparse|all)_)?"
    r"(?:cosine_spearman|spearman|ndcg_at_10)"
)
EARLIER_SCORE = re.compile(r"metrics/(?P<task>.+)/(?:SpearmanCorrCoef|cosine_spearman)")


def collect_series(history: Sequence[Mapping[str, Any]]) -> Series:
    """Batches and values of each finite logged number, in order of batch.

    Args:
        history: Rows ``{"batch": int, "metrics": {key: number}}`` in any order; a row need not hold
            every key.
    """
    series: Series = {}
    for row in sorted(history, key=lambda row: row["batch"]):
        for key, value in row["metrics"].items():
            # Not isfinite, which raises for a whole number beyond a float; NaN is not below it.
            if isinstance(value, int | float) and abs(value) < 1e300:
                batches, values = series.setdefault(key, ([], []))
                batches.append(row["batch"])
                values.append(value)
    return series


def pruned_axes(series: Series) -> list[str]:
    """Axes whose expected sparsity was logged, in the order of ``AXIS_TITLES``."""
    prefix = "pruning/expected_sparsity/"
    found = [key.removeprefix(prefix) for key in series if key.startswith(prefix)]
    return sorted(found, key=[*AXIS_TITLES, *found].index)


def task_losses(series: Series) -> list[str]:
    """Keys of the parts of the task loss where they are logged, or else of the total."""
    keys = [key for key in series if key.startswith("loss/train/")]
    return [key for key in keys if not NOT_TASK.search(key)] or keys[:1]


def logged_scores(series: Series) -> dict[str, str]:
    """Key of the main score of each task and mode, under the name that people read.

    ``eval/<task>/<metric>`` (Spearman correlation or nDCG@10) goes before
    ``metrics/<task>/<metric>``, which is the same score over padded batches.
    """
    found = [(match, key) for key in series if (match := LOGGED_SCORE.fullmatch(key))]
    scores = {_score_name(match): key for match, key in found}
    tasks = {match["task"] for match, _ in found}
    for key in series:
        match = EARLIER_SCORE.fullmatch(key)
        if match and match["task"] not in tasks:
            scores[match["task"]] = key
    return scores


def _score_name(match: re.Match[str]) -> str:
    return f"{match['task']}, {match['mode']}" if match["mode"] else match["task"]


def last_constraint(series: Series) -> dict[str, dict[str, float]]:
    """The constraint at the last logged step, as ``pruning.json`` has it after a cut.

    An axis without a target of its own is held to what would be cut.
    """
    constraint = {}
    for axis in pruned_axes(series):
        values = {
            name: series[key][1][-1]
            for name in ("expected_sparsity", "realised_sparsity", "target_sparsity")
            if (key := f"pruning/{name}/{axis}") in series
        }
        if "realised_sparsity" in values:
            constraint[axis] = {"target_sparsity": values["realised_sparsity"], **values}
    return constraint


def thin(batches: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most ``MAX_POINTS`` points, evenly spread, with the first and the last."""
    count = len(batches)
    if count <= MAX_POINTS:
        return list(batches), list(values)
    places = [round(n * (count - 1) / (MAX_POINTS - 1)) for n in range(MAX_POINTS)]
    return [batches[place] for place in places], [values[place] for place in places]


def running_quantiles(values: Sequence[float]) -> tuple[list[int], list[list[float]]]:
    """A running median with the band that holds most of the values.

    Args:
        values: Numbers in order.

    Returns:
        Places in ``values``, at most ``MAX_POINTS``, and at each the 10th, 50th and 90th percentile
        of the values around it.
    """
    import numpy as np

    places, _ = thin(range(len(values)), values)
    reach = max(1, len(values) // 25)
    array = np.asarray(values)
    windows = [array[max(0, place - reach) : place + reach + 1] for place in places]
    return places, [np.percentile(window, [10, 50, 90]).tolist() for window in windows]


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
