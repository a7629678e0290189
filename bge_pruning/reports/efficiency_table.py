"""Speed and speed-up as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.reports.markdown import table

# Share of the ideal speed-up that a pruned model should reach on long texts in batches.
BAR, LEAST_LENGTH, LEAST_BATCH = 0.9, 128, 32


def render_efficiency(result: Mapping[str, Any]) -> str:
    """What was measured, a table with a row for each setting, and what the ratios support.

    Args:
        result: See :func:`bge_pruning.workflows.efficiency_benchmark.benchmark`.
    """
    compared = result["baseline"] is not None
    header = ["runtime", "texts", "tokens", "ms (p95)", "texts/s", "tokens/s"]
    header += ["GFLOPs/token", "activations"]
    header += ["baseline, ms (p95)", "speed-up", "ideal", "of ideal"] if compared else []
    rows = [_row(setting, compared) for setting in result["settings"]]
    return "\n".join(
        [
            *_head(result),
            "",
            table(header, rows) if rows else "nothing was measured",
            "",
            *_memory(result),
            *_saturation(result["saturation"]),
            *_left_out(result),
            *_claims(result["settings"] if compared else []),
        ]
    )


def _head(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{name + ':':<9} {result[name]}, {shape}, "
        f"{result['parameters'][name]['encoder'] / 1e6:,.1f}M parameters in the encoder, "
        f"{result['parameters'][name]['total'] / 1e6:,.1f}M in all"
        for name, shape in result["shapes"].items()
    ]
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores"
    return [*lines, f"{'machine:':<9} {where}, {result['device']}, {result['dtype']}"]


def _row(setting: Mapping[str, Any], compared: bool) -> list[str]:
    model = setting["model"]
    memory = model["activation_bytes"]
    cells = [
        *(setting["runtime"], str(setting["batch_size"]), _length(setting), _latency(model)),
        *(f"{model['texts_per_s']:,.1f}", f"{model['tokens_per_s']:,.0f}"),
        f"{model['gflops_per_token']:.4f}",
        "-" if memory is None else f"{memory / 1e6:,.1f} MB",
    ]
    if not compared:
        return cells
    low, high = setting["speedup"]["quartiles"]
    share = f"{setting['share']:.0%}"
    if setting["noisy"]:
        share = f"noise, {setting['rounds']} turns"
    return [
        *(*cells, _latency(setting["baseline"])),
        f"{setting['speedup']['median']:.2f} ({low:.2f} to {high:.2f})",
        *(f"{setting['ideal']:.2f}", share),
    ]


def _length(setting: Mapping[str, Any]) -> str:
    """Tokens of a text; of real ones their mean too."""
    if setting["length"] != "real":
        return str(setting["length"])
    return f"real ({setting['model']['tokens_per_text']:.1f})"


def _latency(part: Mapping[str, Any]) -> str:
    return f"{part['latency_ms']['median']:,.1f} ({part['latency_ms']['p95']:,.1f})"


def _memory(result: Mapping[str, Any]) -> list[str]:
    """Weights; those of runtimes that take the same are named together."""
    runtimes: dict[str, list[str]] = {}
    for runtime, found in result["weight_bytes"].items():
        weights = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in found.items())
        runtimes.setdefault(weights, []).append(runtime)
    return [f"weights ({', '.join(names)}): {weights}" for weights, names in runtimes.items()]


def _saturation(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"highest throughput ({runtime}): "
        + "; ".join(
            f"{name} {best['tokens_per_s']:,.0f} tokens/s, {best['texts_per_s']:,.1f} texts/s "
            f"({_place(best)})"
            for name, best in models.items()
        )
        for runtime, models in found.items()
    ]


def _place(setting: Mapping[str, Any]) -> str:
    return f"{setting['batch_size']} x {setting['length']}"


def _left_out(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"left out, needs about {s['needed_bytes'] / 2**30:.1f} GiB and "
        f"{s['free_bytes'] / 2**30:.1f} GiB are free: {s['runtime']}, {_place(s)}"
        for s in result["too_large"]
    ]
    if result["too_long"]:
        lengths = ", ".join(map(str, result["too_long"]))
        lines.append(
            f"left out, beyond the limit of {result['max_length']} tokens a text: {lengths}"
        )
    return lines


def _claims(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    long = [
        s
        for s in settings
        if s["batch_size"] >= LEAST_BATCH and s["length"] != "real" and s["length"] >= LEAST_LENGTH
    ]
    clear = [s for s in long if not s["noisy"]]
    lines = [
        f"{s['runtime']}, {s['batch_size']} texts of {s['length']} tokens: {s['share']:.0%} of the "
        f"ideal speed-up, {'at least' if s['share'] >= BAR else 'below'} {BAR:.0%}"
        for s in clear
    ]
    if len(clear) < len(long):
        lines.append(
            f"{len(long) - len(clear)} of {len(long)} long settings are too noisy for a claim: "
            f"measure longer (--seconds), or on a quiet machine"
        )
    return lines
