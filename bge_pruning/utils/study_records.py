"""What a study writes: one file a finished cell, and one of the original and the floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bge_pruning.utils.record_schemas import MODES, PARAMETERS
from bge_pruning.utils.records import (
    ANYTHING,
    COUNT,
    NUMBER,
    POSITIVE,
    TEXT,
    Each,
    OneOf,
    Optional,
    read_record,
)
from bge_pruning.utils.tasks import METRIC_TITLES

REFERENCE = "reference.json"
FIX = "remove the file and run the study again"

SCORE = {
    "task": TEXT,
    "kind": OneOf("similarity", "retrieval"),
    "mode": OneOf(*MODES),
    "metric": OneOf(*METRIC_TITLES),
    "value": NUMBER,
}
_GATES = {"distance": Each(NUMBER), "gap": Each(NUMBER)}
CELL = {
    "method": TEXT,
    "size": TEXT,
    "seed": COUNT,
    "config_hash": TEXT,
    "config": Each(ANYTHING),
    "encoder_share": POSITIVE,
    "parameters": PARAMETERS,
    "kept_layers": [COUNT],
    "steps": Each(COUNT),
    "tokens": Each(COUNT),
    "seconds": Each(Optional(NUMBER)),
    "scores": [{**SCORE, "retention": Optional(NUMBER)}],
    "gates": Optional(_GATES),
    "cut": Each({"before": NUMBER, "after": NUMBER, "lost": NUMBER}),
    "versions": Each(TEXT),
    "machine": {"cpu": TEXT, "cores": Optional(COUNT), "gpu": Optional(TEXT)},
}
REFERENCES = {
    "original": TEXT,
    "judged_by": ANYTHING,
    "parameters": PARAMETERS,
    "scores": {"original": [SCORE], "word_embeddings": [SCORE], "random_weights": [SCORE]},
    "versions": Each(TEXT),
}


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The finished cells of a study, by size, method and seed as their files are called.

    Args:
        folder: Results folder of the study.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is no finished cell.
    """
    cells = [read_record(path, CELL, FIX) for path in sorted((folder / "cells").glob("*.json"))]
    if not cells:
        raise FileNotFoundError(
            f"{folder / 'cells'}: holds no finished cell. To fix, run scripts/run_quality_study.py "
            f"without --report-only."
        )
    return cells


def read_reference(folder: Path) -> dict[str, Any]:
    """The scores of the original and of the floors.

    Args:
        folder: Results folder of the study.

    Raises:
        FileNotFoundError: If they are not there.
        ValueError: If the file is another one.
    """
    return read_record(folder / REFERENCE, REFERENCES, FIX)
