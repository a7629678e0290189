"""The part of a report about what was gained: parameters, size, memory, speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.reports.markdown import escape, table
from bge_pruning.reports.report_inputs import Inputs
from bge_pruning.reports.summary_plot import count_models, describe_machine, memory_bytes

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count_parts(inputs: Inputs) -> dict[str, Mapping[str, int]]:
    """Parameters by part of the original and of the pruned model, as far as they are known."""
    if inputs.pruning is not None:
        counts = inputs.pruning["parameters"]
        return {"original": counts["source"], "pruned": counts["extracted"]}
    return {} if inputs.evaluation is None else count_models(inputs.evaluation["parameters"])


def render_gains(inputs: Inputs) -> list[str]:
    """Tables of parameters, size and speed; without heading."""
    evaluation = inputs.evaluation
    parts = _parameters(count_parts(inputs))
    if evaluation is not None:
        parts += render_sizes(evaluation) + render_speed(evaluation.get("speed"))
    return parts


def _parameters(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not counts:
        return []
    rows = []
    for part in ("encoder", "embeddings", "pooler", "heads", "total"):
        numbers = [counts[name][part] for name in counts]
        kept = [share(*numbers)] if len(numbers) == 2 else []
        rows.append([part, *(f"{number:,}" for number in numbers), *kept])
    return [table(["parameters", *counts, *(["kept"] if len(counts) == 2 else [])], rows)]


def share(whole: float | None, part: float | None) -> str:
    """How much is kept, in percent."""
    return f"{part / whole:.1%}" if whole and part is not None else "-"


def render_sizes(evaluation: Mapping[str, Any]) -> list[str]:
    """Table of the size on disk and the memory while encoding; nothing if none is known.

    Args:
        evaluation: What :func:`bge_pruning.evaluation.evaluate.evaluate` returns.
    """
    sizes = {"weights on disk": evaluation.get("size_bytes") or {}}
    memory = memory_bytes(evaluation)
    for kind in ("weights", "activations") if memory else ():
        sizes[f"memory of {kind}"] = {name: used[kind] for name, used in memory.items()}
    rows = []
    for name, size in sizes.items():
        both = size.get("baseline"), size.get("model")
        if any(both):
            rows.append([name, *map(render_bytes, both), share(*both)])
    if not rows:
        return []
    parts = [table(["size", "original", "pruned", "kept"], rows)]
    if memory:
        at = evaluation["speed"]["memory_bytes"]
        parts.append(
            f"Activations are the most that other tensors take while {at['texts']:,} texts of up "
            f"to {at['tokens']:,} tokens are embedded."
        )
    return parts


def render_bytes(size: int | None) -> str:
    """A number of bytes as people read it, three digits of it."""
    if size is None:
        return "-"
    unit, name = next((pair for pair in UNITS if size >= pair[0]), UNITS[-1])
    number = size / unit
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {name}"


def render_speed(speed: Mapping[str, Any] | None) -> list[str]:
    """Table of latency and throughput, and what they were measured on.

    Args:
        speed: See :func:`bge_pruning.utils.model_analysis.measure_speed`.
    """
    if not speed:
        return ["Speed: not measured."]
    latency, rate = speed["latency_ms"], speed["throughput_texts_per_s"]
    rows = []
    for name, key in (("median", "median"), ("95th percentile", "p95")):
        cells = [f"{latency[which][key]:.1f} ms" for which in ("baseline", "model")]
        ratio = f"{latency['ratio']:.2f} {_quartiles(latency)}" if key == "median" else "-"
        rows.append([f"one text, {name}", *cells, ratio])
    cells = [f"{rate[which]:.0f} texts/s" for which in ("baseline", "model")]
    many = f"batches of {speed.get('batch_size', 32)}, sorted by length"
    rows.append([many, *cells, f"{rate['ratio']:.2f} {_quartiles(rate)}"])
    return [
        table(["speed", "original", "pruned", "pruned / original"], rows),
        f"Measured in turns in one process on {escape(describe_machine(speed))}; in brackets the "
        "quartiles of the ratio.",
    ]


def _quartiles(figures: Mapping[str, Any]) -> str:
    low, high = figures["ratio_iqr"]
    return f"({low:.2f} to {high:.2f})"
