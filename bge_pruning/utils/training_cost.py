"""The cost of training steps as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.utils.markdown import table


def render_training(result: Mapping[str, Any]) -> str:
    """A table of all measurements, and the ratios in sentences.

    Args:
        result: See :func:`bge_pruning.training_benchmark.summarise`.
    """
    header = ["batches", "training", "s/step", "tokens/s", "padding", "of peak FLOPs", "memory"]
    rows = [
        [
            *(step["batches"], step["training"], f"{step['median_seconds']:.3f}"),
            *(f"{step['tokens_per_second']:,.0f}", f"{step['padding']:.1%}"),
            *(f"{step['utilisation']:.1%}", f"{step['peak_bytes'] / 1e6:,.0f} MB"),
        ]
        for step in result["steps"]
    ]
    lines = [table(header, rows, 2), ""]
    for kind, ratios in result["ratios"].items():
        gates, teacher = (_ratio(ratios[name]) for name in ("gates", "teacher"))
        lines.append(
            f"{kind}: a pruning step takes {gates} times a plain one; a teacher makes it {teacher} "
            f"times as long."
        )
    for kind, times in result["throughput"].items():
        lines.append(f"tokens/s of pruning on {kind}: {times:.2f} times plain on random batches.")
    return "\n".join(lines)


def _ratio(quartiles: list[float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
