"""The trainings that are compared, by name, and their costs as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.reports.markdown import table

PLAIN, GATES, COMPILED, TEACHER, CACHED = "plain", "gates", "compiled", "teacher", "cached"
# Every training, in this order, and what it is.
TRAININGS = {
    PLAIN: "plain fine-tuning",
    GATES: "gates",
    COMPILED: "gates, compiled",
    TEACHER: "gates, teacher on the fly",
    CACHED: "gates, cached teacher",
}
# Those that need no compiler.
UNCOMPILED = tuple(name for name in TRAININGS if name != COMPILED)
# A training's step time is given in times of another's, which it should not exceed by much.
RATIOS = {GATES: PLAIN, COMPILED: PLAIN, TEACHER: GATES, CACHED: GATES}
LIMITS = {GATES: 1.10, COMPILED: 1.10, TEACHER: 1.35, CACHED: 1.03}
# Tokens per second of gates on batches of similar lengths, in times of plain on random batches.
THROUGHPUT_GOAL = 1.5
NOTE = (
    "Data: making the batch. Tokens: without padding. FLOPs: those that real tokens of the trained "
    "model need. Step memory: beside weights and optimizer, in the widest batch."
)


def render_training(result: Mapping[str, Any]) -> str:
    """What was measured, on what, and the ratios, for a person.

    Args:
        result: What ``scripts/benchmark_training.py`` writes.
    """
    header = ["batches", "training", "s/step", "of it data", "tokens/s", "padding"]
    header += ["of peak FLOPs", "step memory"]
    rows = [
        [
            *(cost["batches"], TRAININGS[cost["training"]], f"{cost['median_seconds']:.3f}"),
            f"{cost['data_share']:.2%}",
            *(f"{cost['tokens_per_second']:,.0f}", f"{cost['padding']:.1%}"),
            *(f"{cost['utilisation']:.1%}", f"{cost['peak_bytes'] / 1e6:,.0f} MB"),
        ]
        for cost in result["costs"]
    ]
    lines = [_describe(result), "", table(header, rows, 2), "", NOTE]
    if any(result["ratios"].values()):
        lines += ["", "Times on the same batch, median (quartiles):", "", _ratios(result)]
    if result["throughput"]:
        lines += ["", *_throughput(result["throughput"])]
    return "\n".join(lines)


def _describe(result: Mapping[str, Any]) -> str:
    threads = f"{result['threads']} thread{'' if result['threads'] == 1 else 's'}"
    machine = result["machine"]
    random = "random weights, " if result["random_weights"] else ""
    return (
        f"{result['model']} ({random}{result['shape']}) on {machine['gpu'] or machine['cpu']} "
        f"({result['device']}, {result['dtype']}, {threads}): {result['steps']} steps of "
        f"{result['batch_size']} texts each; a large product reaches "
        f"{result['peak_flops'] / 1e9:,.0f} GFLOP/s."
    )


def _ratios(result: Mapping[str, Any]) -> str:
    measured = list(next(iter(result["ratios"].values())))
    header = ["batches", *(f"{n} / {RATIOS[n]} (limit {LIMITS[n]:.2f})" for n in measured)]
    rows = [
        [kind, *(_spread(ratios[name]) for name in measured)]
        for kind, ratios in result["ratios"].items()
    ]
    if result["reading"]:
        header.append("reading the cache / gates")
        for row in rows:
            row.append(_spread(result["reading"][row[0]], digits=5))
    return table(header, rows)


def _spread(quartiles: Sequence[float], digits: int = 3) -> str:
    low, median, high = (f"{value:.{digits}f}" for value in quartiles)
    return f"{median} ({low} to {high})"


def _throughput(times: Mapping[str, float]) -> list[str]:
    goals = {"length groups": f" (goal: {THROUGHPUT_GOAL} or more)"}
    return [
        f"Tokens/s of gates on {kind}: {value:.2f} times plain on random batches"
        f"{goals.get(kind, '')}."
        for kind, value in times.items()
    ]
