"""The entries of an evaluation, by what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIMILARITY = "cosine_spearman"


def similarity_tasks(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of textual similarity."""
    return [task for task in evaluation["tasks"] if task.get("metric", SIMILARITY) == SIMILARITY]


def retrieval_tasks(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries of retrieval, one for each task, mode and metric."""
    return [task for task in evaluation["tasks"] if task.get("metric", SIMILARITY) != SIMILARITY]
