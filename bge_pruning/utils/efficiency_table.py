"""Speed and speed-up as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.utils.markdown import table

# Share of the ideal speed-up that a pruned model should reach on long texts in batches.
BAR, LEAST_LENGTH, LEAST_BATCH = 0.9, 128, 32


def render_efficiency(result: Mapping[str, Any]) -> str:
    """A table with a row for each setting, and what the ratios support.

    Args:
        result: See :func:`bge_pruning.evaluation.efficiency.measure_efficiency`.
    """
    compared = "baseline" in result["weight_bytes"]
    header = ["texts", "tokens", "ms (p95)", "texts/s", "tokens/s", "GFLOPs/token", "activations"]
    header += ["original, ms (p95)", "speed-up", "ideal", "of ideal"] if compared else []
    rows = [_row(setting, compared) for setting in result["settings"]]
    weights = ", ".join(f"{n} {b / 1e6:,.1f} MB" for n, b in result["weight_bytes"].items())
    lines = [table(header, rows, 0), "", f"weights: {weights}; threads: {result['threads']}"]
    if result["left_out"]:
        lines.append(f"left out, beyond a model's limit: {result['left_out']} tokens")
    return "\n".join([*lines, *_claims(result["settings"] if compared else [])])


def _row(setting: Mapping[str, Any], compared: bool) -> list[str]:
    model = setting["model"]
    memory = model["activation_bytes"]
    cells = [
        *(str(setting["batch_size"]), str(setting["length"]), _latency(model)),
        *(f"{model['texts_per_s']:,.1f}", f"{model['tokens_per_s']:,.0f}"),
        f"{model['gflops_per_token']:.4f}",
        "-" if memory is None else f"{memory / 1e6:,.1f} MB",
    ]
    if not compared:
        return cells
    low, high = setting["speedup"]["quartiles"]
    share = "noise" if setting["noisy"] else f"{setting['share']:.0%}"
    return [
        *(*cells, _latency(setting["baseline"])),
        f"{setting['speedup']['median']:.2f} ({low:.2f} to {high:.2f})",
        *(f"{setting['ideal']:.2f}", share),
    ]


def _latency(part: Mapping[str, Any]) -> str:
    return f"{part['latency_ms']['median']:.1f} ({part['latency_ms']['p95']:.1f})"


def _claims(settings: list[Mapping[str, Any]]) -> list[str]:
    long = [
        s
        for s in settings
        if s["batch_size"] >= LEAST_BATCH and s["length"] != "real" and s["length"] >= LEAST_LENGTH
    ]
    clear = [s for s in long if not s["noisy"]]
    lines = [
        f"{s['batch_size']} texts of {s['length']} tokens: {s['share']:.0%} of the ideal speed-up, "
        f"{'at least' if s['share'] >= BAR else 'below'} {BAR:.0%}"
        for s in clear
    ]
    if len(clear) < len(long):
        lines.append(
            f"{len(long) - len(clear)} of {len(long)} long settings are too noisy for a claim: "
            f"measure longer (--seconds), or on a quiet machine"
        )
    return lines
