"""The inputs of a report: the files of a results folder, and logged numbers as curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import yaml

from bge_pruning.config.load import check_yaml
from bge_pruning.utils.json_records import (
    Count,
    Record,
    Text,
    parse_json,
    parse_record,
    read_record,
)
from bge_pruning.utils.records import Constraint, EvaluationRecord, PruningRecord
from bge_pruning.utils.visualization import AXIS_TITLES

COMMANDS, VERSIONS = "commands.txt", "versions.json"
AGAIN, REMOVE = "write it again", "remove the line"
NEEDED = ("evaluation.json", "pruning.json", "metrics.jsonl")  # at least one of them
T = TypeVar("T")
# Batches and values of each key.
Series = dict[str, tuple[list[int], list[float]]]
MAX_POINTS = 400  # more cannot be told apart on paper, and make a heavy file
NOT_TASK = re.compile(r"total|lagrang|sparsity|pruning|constraint")
LOGGED_SCORE = re.compile(
    r"eval/(?P<task>.+)/(?:(?P<mode>sparse|colbert|dense\+sparse|all)_)?"
    r"(?:cosine_spearman|spearman|ndcg_at_10)"
)
EARLIER_SCORE = re.compile(r"metrics/(?P<task>.+)/(?:SpearmanCorrCoef|cosine_spearman)")


class ConfiguredModel(Record):
    """The model that a configuration names."""

    base_model: Text | None = None


class ConfigFile(Record):
    """``config.yaml``, as far as a report reads it."""

    model: ConfiguredModel | None = None
    seed: Count | None = None


class HistoryRow(Record):
    """A line of ``metrics.jsonl``."""

    batch: Count
    metrics: dict[str, Any]


def collect_series(history: Iterable[HistoryRow]) -> Series:
    """Batches and values of each finite logged number, in order of batch."""
    series: Series = {}
    for row in sorted(history, key=lambda row: row.batch):
        for key, value in row.metrics.items():
            # isfinite would raise for a whole number that no float can hold; NaN is not smaller.
            if isinstance(value, int | float) and abs(value) < 1e300:
                batches, values = series.setdefault(key, ([], []))
                batches.append(row.batch)
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


def last_constraint(series: Series) -> dict[str, Constraint]:
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
            values = {"target_sparsity": values["realised_sparsity"], **values}
            constraint[axis] = Constraint.model_construct(**values)  # any finite number
    return constraint


def thin(batches: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most ``MAX_POINTS`` points, evenly spread, with the first and the last."""
    count = len(batches)
    if count <= MAX_POINTS:
        return list(batches), list(values)
    places = [round(n * (count - 1) / (MAX_POINTS - 1)) for n in range(MAX_POINTS)]
    return [batches[place] for place in places], [values[place] for place in places]


def running_quantiles(values: Sequence[float]) -> tuple[list[int], list[list[float]]]:
    """At most ``MAX_POINTS`` places, and percentiles (10, 50, 90) of the values around each."""
    places, _ = thin(range(len(values)), values)
    reach = max(1, len(values) // 25)
    array = np.asarray(values)
    windows = [array[max(0, place - reach) : place + reach + 1] for place in places]
    return places, [np.percentile(window, [10, 50, 90]).tolist() for window in windows]


@dataclass
class Inputs:
    """What a folder holds; ``None`` or empty for a file that is not there.

    ``series`` and ``recovery`` are the curves of ``metrics.jsonl`` and ``metrics-recovery.jsonl``.
    ``gates`` holds open probabilities by axis and ``kept`` booleans of the same shapes, both of
    ``gates.npz``. ``versions`` are those of the run. ``missing`` names the files that are not
    there.
    """

    name: str
    evaluation: EvaluationRecord | None
    pruning: PruningRecord | None
    series: Series
    recovery: Series
    gates: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    config_text: str
    config: ConfigFile
    versions: dict[str, str]
    commands: list[str]
    missing: list[str]


def read_inputs(folder: Path, commands: Sequence[str] = ()) -> Inputs:
    """Read the files of a results folder or run folder; one of ``NEEDED`` has to be there."""
    missing: list[str] = []

    def read(name: str, reader: Callable[[Path], T], default: T) -> T:
        if (folder / name).is_file():
            return reader(folder / name)
        missing.append(name)
        return default

    evaluation = read(NEEDED[0], partial(read_record, kind=EvaluationRecord, fix=AGAIN), None)
    pruning = read(NEEDED[1], partial(read_record, kind=PruningRecord, fix=AGAIN), None)
    series = read(NEEDED[2], _read_series, {})
    recovery = read("metrics-recovery.jsonl", _read_series, {})
    gates, kept = read("gates.npz", _read_gates, ({}, {}))
    config_text, config = read("config.yaml", _read_config, ("", ConfigFile()))
    if set(NEEDED) <= set(missing):
        raise FileNotFoundError(
            f"{folder} holds neither {' nor '.join(NEEDED)}. To fix, give the folder of a run, or "
            "the results folder of one that was extracted or evaluated."
        )
    has_versions = (folder / VERSIONS).is_file()
    # The command of the evaluation is the best that is known without a file of them.
    recorded = [evaluation.command] if evaluation is not None and evaluation.command else []
    found = (evaluation, pruning, series, recovery, gates, kept, config_text, config)
    return Inputs(
        folder.resolve().name,
        *found,
        versions=read_record(folder / VERSIONS, dict[str, Text], AGAIN) if has_versions else {},
        commands=list(commands) or read(COMMANDS, _read_commands, recorded),
        missing=missing,
    )


def _read_commands(path: Path) -> list[str]:
    return [line for line in _read_text(path).splitlines() if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8. To fix, {AGAIN}.") from error


def _read_series(path: Path) -> Series:
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            rows.append(parse_record(parse_json(line, where, REMOVE), HistoryRow, where, REMOVE))
    return collect_series(rows)


def _read_gates(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    try:
        # Opened here, because np.load leaves a file open that is not an archive.
        with path.open("rb") as file, np.load(file) as arrays:
            content = {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, OSError, TypeError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path} holds no arrays ({error}). To fix, {AGAIN}.") from error
    gates = {name: array for name, array in content.items() if not name.endswith("_kept")}
    return gates, {a: content[f"{a}_kept"] for a in gates if f"{a}_kept" in content}


def _read_config(path: Path) -> tuple[str, ConfigFile]:
    text = _read_text(path)
    try:
        check_yaml(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date or number
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not YAML ({reason}). To fix, {AGAIN}.") from error
    return text, parse_record(content, ConfigFile, str(path), AGAIN)
