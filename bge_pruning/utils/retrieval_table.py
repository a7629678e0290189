"""Retrieval scores as the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.utils.tasks import retrieval_tasks

HEADER = (
    *("task", "mode", "nDCG@10", "95 % interval", "original", "floor", "kept", "above floor", "p"),
    *("MRR@10", "Recall@100", "MAP"),
)
OTHER_METRICS = ("mrr_at_10", "recall_at_100", "map_at_100")


def retrieval_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """A row for each task and mode, as ``HEADER`` names its cells.

    Args:
        evaluation: With the entries of :func:`bge_pruning.evaluation.retrieval.evaluate_retrieval`.
    """
    tasks = retrieval_tasks(evaluation)
    others = {(t["task"], t["mode"], t["metric"]): t["value"] for t in tasks}
    rows = []
    for task in (t for t in tasks if t["metric"] == "ndcg_at_10"):
        low, high = task["interval"]
        rows.append(
            [
                *(task["task"], task["mode"], f"{task['value']:.4f}", f"{low:.3f} to {high:.3f}"),
                *(_cell(task[name], ".4f") for name in ("baseline", "floor")),
                *(_cell(task[name], ".1%") for name in ("retention", "retention_above_floor")),
                _cell(task.get("p_value"), ".3f"),
                *(f"{others[task['task'], task['mode'], name]:.4f}" for name in OTHER_METRICS),
            ]
        )
    return rows


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def render_retrieval(evaluation: Mapping[str, Any]) -> list[str]:
    """Heading, explanation and Markdown table; nothing if there was no retrieval.

    Args:
        evaluation: As in :func:`retrieval_rows`.
    """
    rows = retrieval_rows(evaluation)
    if not rows:
        return []
    lines = ["| " + " | ".join(HEADER) + " |", "| --- | --- |" + " ---: |" * (len(HEADER) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [
        "## Retrieval",
        "Scores are mteb's. The interval is a bootstrap over queries; p is that of a paired test "
        "against the original: a large one means that the difference may be chance. The floor is "
        "the larger of random weights of the same shape and, for dense vectors, the mean of the "
        "word embeddings; what is kept above it is (pruned - floor) / (original - floor).",
        "\n".join(lines),
    ]
