"""STUDY.yaml: a grid of methods, sizes and seeds, and what each model of it is judged by."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bge_pruning.config.load import Config, load_config, read_mapping
from bge_pruning.config.schema import ConfigError
from bge_pruning.config.shipped import find_config
from bge_pruning.utils.records import COUNT, TEXT, Each, Optional, check_record

SCHEMA = {
    "base": [TEXT],
    "overrides?": [TEXT],
    "methods": Each([TEXT]),
    "sizes": Each([TEXT]),
    "seeds": [COUNT],
    "sts?": [TEXT],
    "retrieval?": Each(TEXT),
    "modes?": [TEXT],
    "max_length?": Optional(COUNT),
    "original?": Optional(TEXT),
    "results_folder?": TEXT,
    "run_folder?": TEXT,
}
KEYS = [key.removesuffix("?") for key in SCHEMA]
# Names become parts of file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
FIX = "see configs/quality/study.yaml for the layout"


@dataclass(frozen=True)
class Study:
    """A grid of pipeline runs.

    Attributes:
        base: YAML files of every run.
        overrides: ``key=value`` strings of every run.
        methods: More of them, by the name of a method.
        sizes: More of them, by the name of a size.
        seeds: Of the runs.
        sts: Files of scored pairs to judge by, or names of tasks.
        retrieval: Folders in BEIR layout or names of tasks, and the split of each.
        modes: See :data:`bge_pruning.evaluation.search.MODES`.
        max_length: Tokens at which texts are cut in evaluation; ``None`` for the models' own limit.
        original: The model whose scores count as 100 %; ``None`` for the one that is pruned.
        results: Folder of what is kept.
        runs: Folder of what is removed when a cell is done.
    """

    base: tuple[str, ...]
    overrides: tuple[str, ...]
    methods: Mapping[str, Sequence[str]]
    sizes: Mapping[str, Sequence[str]]
    seeds: tuple[int, ...]
    sts: tuple[str, ...]
    retrieval: Mapping[str, str]
    modes: tuple[str, ...]
    max_length: int | None
    original: str | None
    results: Path
    runs: Path


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
    """Read and check a study; the configurations of its cells are not looked at yet.

    Args:
        path: YAML file, or the name of a shipped one; the files under ``base`` are named relative
            to it.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is wrong.
    """
    path = find_config(path)
    content = read_mapping(path)
    for key in content:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            fix = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(KEYS)}."
            raise ConfigError(f"{path}: unknown key '{key}': {fix}")
    try:
        check_record(content, SCHEMA, str(path), FIX)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_grid(content, path)
    results = Path(content.get("results_folder", "experiments/results/quality"))
    return Study(
        base=tuple(str(path.parent / file) for file in content["base"]),
        overrides=tuple(content.get("overrides", ())),
        methods=content["methods"],
        sizes=content["sizes"],
        seeds=tuple(content["seeds"]),
        sts=tuple(content.get("sts", ())),
        retrieval=content.get("retrieval", {}),
        modes=tuple(content.get("modes", ("dense",))),
        max_length=content.get("max_length"),
        original=content.get("original"),
        results=results,
        runs=Path(content.get("run_folder", f"experiments/checkpoints/{results.name}")),
    )


def _check_grid(content: Mapping[str, Any], path: Path) -> None:
    for key in ("base", "methods", "sizes", "seeds"):
        if not content[key]:
            raise ConfigError(f"{path}: {key} is empty. To fix, {FIX}.")
    if not content.get("sts") and not content.get("retrieval"):
        raise ConfigError(
            f"{path}: nothing to judge by. To fix, name files under sts, or folders under "
            f"retrieval."
        )
    for key in ("methods", "sizes"):
        for name in content[key]:
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"{path}: {key} '{name[:60]}' is no name of letters, digits, '_', '.' and '-'. "
                    f"To fix, rename it."
                )
    for key in ("seeds", "modes", "sts"):
        values = content.get(key, [])
        if repeated := sorted({value for value in values if values.count(value) > 1}):
            raise ConfigError(f"{path}: {key} names {repeated[0]} twice. To fix, name it once.")


def list_cells(study: Study) -> list[Cell]:
    """All cells; every beginning of the list is as useful as it can be.

    First come all methods at one size with one seed, then the other sizes, then the other seeds.
    """
    return [
        Cell(method, size, seed)
        for seed in study.seeds
        for size in study.sizes
        for method in study.methods
    ]


def select_cells(study: Study, only: Sequence[str]) -> list[Cell]:
    """The cells that are asked for.

    Args:
        study: The study.
        only: Conditions ``method=NAMES``, ``size=NAMES``, ``seed=NUMBERS``, values separated by
            commas; all of them must hold.

    Raises:
        ConfigError: If a condition is none, or names what the study does not have.
    """
    known = {
        "method": list(study.methods),
        "size": list(study.sizes),
        "seed": [str(seed) for seed in study.seeds],
    }
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
        if cell.method in wanted["method"]
        and cell.size in wanted["size"]
        and str(cell.seed) in wanted["seed"]
    ]


def cell_config(study: Study, cell: Cell, stage: str) -> Config:
    """The configuration of one stage of a cell, which goes on where an earlier call was stopped.

    Args:
        study: The study.
        cell: The cell.
        stage: ``prune`` or ``recover``.

    Raises:
        ConfigError: If a file cannot be read, or a key or value is wrong.
    """
    own = [
        f"seed={cell.seed}",
        f"run_name={cell.name}",
        f"run_folder={study.runs / cell.name}",
        f"results_folder={study.runs / cell.name}-results",
        "autoresume=true",
        "overwrite=false",
        "checkpoints_to_keep=1",
        f"stage={stage}",
    ]
    grid = [*study.overrides, *study.methods[cell.method], *study.sizes[cell.size]]
    try:
        return load_config(study.base, [*grid, *own])
    except ConfigError as error:
        raise ConfigError(f"{cell.name}: {error}") from None
