"""The files of a study: one for each finished cell, and one of the original and the floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bge_pruning.utils.json_records import Count, Number, Positive, Record, Text, read_record
from bge_pruning.utils.records import Metric, Mode, Parameters, TaskKind

REFERENCE = "reference.json"
FIX = "remove the file and run the study again"


class StudyScore(Record):
    """A main score; ``retention`` is the share of the original's."""

    task: Text
    kind: TaskKind
    mode: Mode
    metric: Metric
    value: Number
    retention: Number | None = None


class GateState(Record):
    """Mean distance of open probabilities from 0 or 1, and expected minus target sparsity."""

    distance: dict[str, Number]
    gap: dict[str, Number]


class Cut(Record):
    """Score of a task before and after the cut, and the difference."""

    before: Number
    after: Number
    lost: Number


class Machine(Record):
    """What a speed was measured on."""

    cpu: Text
    cores: Count | None
    gpu: Text | None


class StudyCell(Record):
    """A finished cell of a study: one method at one size with one seed."""

    method: Text
    size: Text
    seed: Count
    config_hash: Text
    config: dict[str, Any]
    encoder_share: Positive
    parameters: Parameters
    kept_layers: list[Count]
    steps: dict[str, Count]
    tokens: dict[str, Count]
    seconds: dict[str, Number | None]
    scores: list[StudyScore]
    gates: GateState | None
    cut: dict[str, Cut]
    versions: dict[str, Text]
    machine: Machine


class ReferenceScores(Record):
    """Scores of the original and of the floors, each in all tasks and modes."""

    original: list[StudyScore]
    word_embeddings: list[StudyScore]
    random_weights: list[StudyScore]


class StudyReference(Record):
    """The original of a study and the floors."""

    original: Text
    judged_by: Any
    parameters: Parameters
    scores: ReferenceScores
    versions: dict[str, Text]


def read_cells(folder: Path) -> list[StudyCell]:
    """The finished cells of a study, ordered by file name: size, method and seed."""
    paths = sorted((folder / "cells").glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"{folder / 'cells'}: holds no finished cell. To fix, run scripts/run_quality_study.py "
            f"without --report-only."
        )
    return [read_record(path, StudyCell, FIX) for path in paths]


def read_reference(folder: Path) -> StudyReference:
    """The scores of the original and of the floors, from the results folder of a study.

    Raises:
        ValueError: If a floor is unknown, as in files of earlier versions: the others may be low.
    """
    reference = read_record(folder / REFERENCE, StudyReference, FIX)
    wanted = [(score.task, score.mode) for score in reference.scores.original]
    for name in ("word_embeddings", "random_weights"):
        found = {(score.task, score.mode) for score in getattr(reference.scores, name)}
        if missing := [key for key in wanted if key not in found]:
            task, mode = missing[0]
            raise ValueError(
                f"{folder / REFERENCE}: {name} has no score of {task}, {mode}. To fix, {FIX}."
            )
    return reference
