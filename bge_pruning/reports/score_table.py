"""Scores as the rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.reports.markdown import escape, table
from bge_pruning.utils.tasks import METRIC_TITLES, main_scores

LABELS = 3  # columns at the left that hold words


def score_header(evaluation: Mapping[str, Any]) -> list[str]:
    """Names of the cells of :func:`score_rows`.

    Args:
        evaluation: What :func:`bge_pruning.evaluation.evaluate.evaluate` returns.
    """
    return [
        *("task", "mode", "metric", "original", *_others(evaluation), "model", "95 % interval"),
        *("random weights", "word embeddings", "kept", "kept above floor", "p"),
    ]


def score_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """A row for each task and mode, as :func:`score_header` names its cells.

    Args:
        evaluation: As there.
    """
    names = _others(evaluation)
    return [_row(entry, names) for entry in main_scores(evaluation)]


def _others(evaluation: Mapping[str, Any]) -> list[str]:
    """Further models that were scored."""
    return list(dict.fromkeys(n for entry in evaluation["tasks"] for n in entry.get("also", {})))


def _row(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    low, high = entry["interval"]
    floors = entry["floors"]
    scores = [
        entry["baseline"],
        *(entry.get("also", {}).get(name) for name in names),
        entry["value"],
    ]
    return [
        *(entry["task"], entry["mode"], METRIC_TITLES[entry["metric"]]),
        *(_cell(score, ".4f") for score in scores),
        f"{low:.3f} to {high:.3f}",
        *(_cell(floors.get(name), ".4f") for name in ("random_weights", "word_embeddings")),
        *(_cell(entry[name], ".1%") for name in ("retention", "retention_above_floor")),
        _cell(entry.get("p_value"), ".3f"),
    ]


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def truncation_notes(evaluation: Mapping[str, Any]) -> list[str]:
    """A sentence for each task whose texts were cut.

    Args:
        evaluation: As in :func:`score_rows`.
    """
    counts = {entry["task"]: (entry["truncated"], entry["texts"]) for entry in evaluation["tasks"]}
    return [
        f"{task}: {cut:,} of {texts:,} texts are longer than the limit of tokens and were cut."
        for task, (cut, texts) in counts.items()
        if cut
    ]


def render_scores(evaluation: Mapping[str, Any]) -> list[str]:
    """Heading, explanation and Markdown tables, an entry each; nothing if nothing was scored.

    Args:
        evaluation: As in :func:`score_rows`.
    """
    parts = render_main_scores(evaluation)
    return [*parts, *_render_other_metrics(evaluation)] if parts else []


def render_main_scores(evaluation: Mapping[str, Any]) -> list[str]:
    """As :func:`render_scores`, without what else mteb computed.

    Args:
        evaluation: As there.
    """
    rows = score_rows(evaluation)
    if not rows:
        return []
    return [
        "## Quality",
        "Scores are mteb's: Spearman correlation of a pair's similarity with its gold score, "
        "nDCG@10 of retrieval. The interval is a 95 % bootstrap over pairs or queries; p is that "
        "of a paired test against the original: a large one means that the difference may be "
        "chance. Random weights of the same shape and, for dense vectors, the mean of the word "
        "embeddings without any encoder are floors. What is kept above the floor is (model - "
        "floor) / (original - floor), with the larger floor.",
        table(score_header(evaluation), rows, LABELS),
        *(escape(note) for note in truncation_notes(evaluation)),
    ]


def _render_other_metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """What else mteb computed."""
    rows = [
        [
            *(entry["task"], entry["mode"], METRIC_TITLES[entry["metric"]]),
            *(_cell(entry[name], ".4f") for name in ("baseline", "value", "floor")),
            _cell(entry["retention"], ".1%"),
        ]
        for entry in evaluation["tasks"]
        if not entry["main"]
    ]
    header = ["task", "mode", "metric", "original", "model", "floor", "kept"]
    return [table(header, rows, LABELS)] if rows else []
