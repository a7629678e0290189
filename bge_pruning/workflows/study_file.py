"""STUDY.yaml: a grid of methods, sizes and seeds, and the identity of each cell of the grid."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import Field

from bge_pruning.config.load import Config, load_config, read_mapping
from bge_pruning.config.names import HELD_OUT, L0
from bge_pruning.config.schema import ConfigError, L0ModuleConfig, ModelConfig, SourceConfig
from bge_pruning.config.shipped import find_config
from bge_pruning.reports.study_records import FIX as RUN_AGAIN
from bge_pruning.reports.study_records import StudyCell
from bge_pruning.utils.json_records import Count, Record, Text, parse_record, read_record

# Names become parts of file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
FIX = "see configs/quality/study.yaml for the layout"


class Study(Record):
    """A grid of pipeline runs, as its file has it.

    Attributes:
        base: YAML files of every run.
        overrides: ``key=value`` strings of every run.
        methods: More of them, by the name of a method.
        sizes: More of them, by the name of a size.
        sts: Files of scored pairs to judge by, or names of tasks.
        retrieval: Folders in BEIR layout or names of tasks, and the split of each.
        parallel: Pairs of languages by the path of line-parallel files.
        lines: Which of their lines.
        max_length: Tokens at which texts are cut in evaluation; ``None`` for the models' own limit.
        original: The model whose scores count as 100 %; ``None`` for the one that is pruned.
    """

    base: list[Text]
    overrides: list[Text] = Field(default_factory=list)
    methods: dict[str, list[Text]]
    sizes: dict[str, list[Text]]
    seeds: list[Count]
    sts: list[Text] = Field(default_factory=list)
    retrieval: dict[str, Text] = Field(default_factory=dict)
    parallel: dict[str, list[Text]] = Field(default_factory=dict)
    lines: Text = HELD_OUT
    modes: list[Text] = Field(default_factory=lambda: ["dense"])
    max_length: Count | None = None
    original: Text | None = None
    results_folder: Text = "experiments/results/quality"
    run_folder: Text | None = None

    @property
    def results(self) -> Path:
        """Folder of what is kept."""
        return Path(self.results_folder)

    @property
    def runs(self) -> Path:
        """Folder of what is removed when a cell is done."""
        return Path(self.run_folder or f"experiments/checkpoints/{self.results.name}")


KEYS = list(Study.model_fields)
SOURCE_KEY = re.compile(r"data\.(train|eval)\.\d+\.\w+$")
# What a result does not depend on.
INCIDENTAL = (
    "run_name run_folder results_folder data.processed_folder data.on_trained_eval teacher.cache "
    "autoresume overwrite dry_run stage checkpoints_to_keep save_interval progress_bar "
    "log_interval dist_timeout loggers"
).split()
# What a baseline does not depend on either: how gates are trained.
OF_GATES = ["optimizer.l0_lr", "optimizer.lagrangian_lr", "optimizer.lambda_2_lr"] + [
    f"model.l0_module.{key.name}"
    for key in fields(L0ModuleConfig)
    if key.name != "pruning_modules" and not key.name.startswith("target_")
]


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    method: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-{self.size}-seed{self.seed}"


def read_study(path: Path) -> Study:
    """Read and check a study file, or a shipped one by its name; its cells are not looked at yet.

    Files under ``base`` are relative to the study file.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is invalid.
    """
    path = find_config(path)
    content = read_mapping(path)
    for key in (key for key in content if key not in KEYS):
        close = difflib.get_close_matches(str(key), KEYS, n=1)
        fix = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(KEYS)}."
        raise ConfigError(f"{path}: unknown key '{key}': {fix}")
    try:
        study = parse_record(content, Study, str(path), FIX)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_grid(study, path)
    study.base = [str(path.parent / file) for file in study.base]
    return study


def _check_grid(given: Study, path: Path) -> None:
    for key in ("base", "methods", "sizes", "seeds"):
        if not getattr(given, key):
            raise ConfigError(f"{path}: {key} is empty. To fix, {FIX}.")
    if not (given.sts or given.retrieval or given.parallel):
        raise ConfigError(
            f"{path}: nothing to judge by. To fix, name files under sts, folders under retrieval, "
            f"or pairs of languages under parallel."
        )
    for key in ("methods", "sizes"):
        for name in getattr(given, key):
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"{path}: {key} '{name[:60]}' is no name of letters, digits, '_', '.' and '-'. "
                    f"To fix, rename it."
                )
    for key in ("seeds", "modes", "sts"):
        values = getattr(given, key)
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            raise ConfigError(f"{path}: {key} names {repeated[0]} twice. To fix, name it once.")


def list_cells(study: Study) -> list[Cell]:
    """All cells: every method at one size with one seed, then the other sizes, then other seeds."""
    return [
        Cell(method, size, seed)
        for seed in study.seeds
        for size in study.sizes
        for method in study.methods
    ]


def select_cells(study: Study, only: Sequence[str]) -> list[Cell]:
    """The cells that are asked for by conditions, all of which must hold.

    A condition is ``method=NAMES``, ``size=NAMES`` or ``seed=NUMBERS``, values separated by commas.

    Raises:
        ConfigError: If a condition is none, or names what the study does not have.
    """
    seeds = [str(seed) for seed in study.seeds]
    known = {"method": list(study.methods), "size": list(study.sizes), "seed": seeds}
    wanted = {key: set(values) for key, values in known.items()}
    for condition in only:
        key, separator, values = condition.partition("=")
        if not separator or key not in known:
            raise ConfigError(
                f"--only {condition}: is not KEY=VALUES with a key of {', '.join(known)}. To fix, "
                f"write e.g. --only method=l0."
            )
        named = values.split(",")
        if missing := [value for value in named if value not in known[key]]:
            raise ConfigError(
                f"--only {condition}: the study has no {key} '{missing[0]}', but "
                f"{', '.join(known[key])}. To fix, choose of these."
            )
        wanted[key] &= set(named)
    return [
        cell
        for cell in list_cells(study)
        if all(str(getattr(cell, key)) in values for key, values in wanted.items())
    ]


def cell_config(study: Study, cell: Cell, stage: str) -> Config:
    """The configuration of one stage of a cell, which resumes what an earlier call has begun.

    Raises:
        ConfigError: If a file cannot be read, or a key or value is invalid.
    """
    run = study.runs / cell.name
    own = [f"seed={cell.seed}", f"run_name={cell.name}", f"run_folder={run}", f"stage={stage}"]
    own += [f"results_folder={run}-results", "autoresume=true", "overwrite=false"]
    grid = [*study.overrides, *study.methods[cell.method], *study.sizes[cell.size]]
    try:
        return load_config(study.base, [*grid, *own, "checkpoints_to_keep=1"])
    except ConfigError as error:
        raise ConfigError(f"{cell.name}: {error}") from None


def cell_file(study: Study, cell: Cell) -> Path:
    """Where a finished cell is written."""
    return study.results / "cells" / f"{cell.name}.json"


def describe_config(study: Study, cell: Cell) -> dict[str, Any]:
    """All that the result of a cell depends on, as values by dotted key."""
    config = cell_config(study, cell, "prune")
    keys = {"sts", "retrieval", "modes", "max_length", "original"}
    keys |= {"parallel", "lines"} if study.parallel else set()
    judged_by = study.model_dump(include=keys)
    described = _without({**asdict(config), "judged_by": judged_by}, INCIDENTAL)
    if config.method == L0:
        return described
    # All its steps are of recovery.
    described["max_duration"] = cell_config(study, cell, "recover").max_duration
    return _without(described, [*OF_GATES, "recovery.max_duration"])


def _without(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(content).items()
        if not any(key == name or key.startswith(f"{name}.") for name in names)
    }


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys and lists of JSON as dotted keys; an empty list or object is a value."""
    if not isinstance(content, dict | list) or not content:
        return {prefix: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def hash_config(config: Mapping[str, Any]) -> str:
    """Short name of a described configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def find_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ; a key that one of them does not know yet has its default there."""
    plain = flatten(asdict(Config(model=ModelConfig(l0_module=L0ModuleConfig()))))
    of_source = asdict(SourceConfig())

    def default(key: str) -> Any:
        return of_source.get(key.rpartition(".")[2]) if SOURCE_KEY.match(key) else plain.get(key)

    return [
        key
        for key in _without({**then, **now}, INCIDENTAL)
        if then.get(key, default(key)) != now.get(key, default(key))
    ]


def unfinished(study: Study, cells: Sequence[Cell], overwrite: bool = False) -> list[Cell]:
    """The cells that are still to be run; with ``overwrite``, also those of another configuration.

    Raises:
        ConfigError: If a cell is finished with another configuration, which is not overwritten.
        ValueError: If a file is no finished cell.
    """
    todo = []
    for cell in cells:
        path = cell_file(study, cell)
        if not path.is_file():
            todo.append(cell)
            continue
        then = read_record(path, StudyCell, RUN_AGAIN).config
        now = describe_config(study, cell)
        differing = find_differences(then, now)
        if differing and not overwrite:
            key = differing[0]
            raise ConfigError(
                f"{path} is of another configuration ({key} was {then.get(key)!r} and is "
                f"{now.get(key)!r}) and is kept. To fix, set another results_folder in the study, "
                f"or run the cell again with --overwrite."
            )
        todo += [cell] if differing else []
    return todo
