"""Finished cells of a study: where they lie, and whether they are of the same configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bge_pruning.config.schema import L0, Config, ConfigError, L0ModuleConfig, ModelConfig
from bge_pruning.utils.records import read_record
from bge_pruning.utils.study_records import CELL, FIX
from bge_pruning.workflows.study_file import Cell, Study, cell_config

# What a result does not depend on.
INCIDENTAL = (
    *("run_name", "run_folder", "results_folder", "data.processed_folder"),
    *("autoresume", "overwrite", "dry_run", "stage", "checkpoints_to_keep", "save_interval"),
    *("progress_bar", "log_interval", "dist_timeout", "loggers"),
)
# And that of a baseline: how gates are trained.
OF_GATES = (
    *("optimizer.l0_lr", "optimizer.lagrangian_lr", "optimizer.lambda_2_lr"),
    *(
        f"model.l0_module.{key.name}"
        for key in fields(L0ModuleConfig)
        if key.name != "pruning_modules" and not key.name.startswith("target_")
    ),
)


def cell_file(study: Study, cell: Cell) -> Path:
    """Where a finished cell is written."""
    return study.results / "cells" / f"{cell.name}.json"


def describe_config(study: Study, cell: Cell) -> dict[str, Any]:
    """All that the result of a cell depends on, as values by dotted key.

    Raises:
        ConfigError: See :func:`bge_pruning.workflows.study_file.cell_config`.
    """
    config = cell_config(study, cell, "prune")
    content = asdict(config)
    judged_by = {
        "sts": list(study.sts),
        "retrieval": dict(study.retrieval),
        "modes": list(study.modes),
        "max_length": study.max_length,
        "original": study.original,
    }
    described = _without({**content, "judged_by": judged_by}, INCIDENTAL)
    if config.method == L0:
        return described
    # All its steps are of recovery.
    described["max_duration"] = cell_config(study, cell, "recover").max_duration
    return _without(described, (*OF_GATES, "recovery.max_duration"))


def _without(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {
        key: value
        for key, value in flatten(dict(content)).items()
        if not any(key == name or key.startswith(f"{name}.") for name in names)
    }


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys and lists as dotted keys; an empty list or object is a value.

    Args:
        content: Of JSON types.
        prefix: Of the keys.
    """
    if not isinstance(content, dict | list) or not content:
        return {prefix: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def hash_config(config: Mapping[str, Any]) -> str:
    """Short name of a configuration.

    Args:
        config: See :func:`describe_config`.
    """
    text = json.dumps(dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def find_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ; a key that one of them does not know yet has its default there.

    Args:
        then: Configuration of a finished cell.
        now: The one of the study as it is.
    """
    plain = flatten(asdict(Config(model=ModelConfig(l0_module=L0ModuleConfig()))))
    return [
        key
        for key in dict.fromkeys([*then, *now])
        if then.get(key, plain.get(key)) != now.get(key, plain.get(key))
    ]


def unfinished(study: Study, cells: Sequence[Cell], overwrite: bool = False) -> list[Cell]:
    """The cells that are still to be run.

    Args:
        study: The study.
        cells: Cells that are asked for.
        overwrite: Count finished cells of another configuration as not there.

    Raises:
        ConfigError: If a cell is finished with another configuration.
        ValueError: If a file is no finished cell.
    """
    todo = []
    for cell in cells:
        path = cell_file(study, cell)
        if not path.is_file():
            todo.append(cell)
            continue
        then = read_record(path, CELL, FIX)["config"]
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
