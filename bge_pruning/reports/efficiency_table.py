"""Speed, memory and the cost of trainings as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.reports.markdown import table
from bge_pruning.utils.records import CACHED, COMPILED, GATES, PLAIN, TEACHER, TRAININGS

# A pruned model should reach this share of the ideal speed-up on long texts in batches.
BAR, LEAST_LENGTH, LEAST_BATCH = 0.9, 128, 32


def render_efficiency(result: Mapping[str, Any]) -> str:
    """Describe a benchmark: models, machine, a row for each setting, and the claims it supports.

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
    cells = [setting["runtime"], str(setting["batch_size"]), _length(setting), _latency(model)]
    cells += [
        f"{model['texts_per_s']:,.1f}",
        f"{model['tokens_per_s']:,.0f}",
        f"{model['gflops_per_token']:.4f}",
        "-" if memory is None else f"{memory / 1e6:,.1f} MB",
    ]
    if not compared:
        return cells
    low, high = setting["speedup"]["quartiles"]
    noise = f"noise, {setting['rounds']} turns" if setting["noisy"] else ""
    cells += [
        _latency(setting["baseline"]),
        f"{setting['speedup']['median']:.2f} ({low:.2f} to {high:.2f})",
        f"{setting['ideal']:.2f}",
        noise or f"{setting['share']:.0%}",
    ]
    return cells


def _length(setting: Mapping[str, Any]) -> str:
    """Tokens of a text; for real texts their mean too."""
    if setting["length"] != "real":
        return str(setting["length"])
    return f"real ({setting['model']['tokens_per_text']:.1f})"


def _latency(part: Mapping[str, Any]) -> str:
    return f"{part['latency_ms']['median']:,.1f} ({part['latency_ms']['p95']:,.1f})"


def _memory(result: Mapping[str, Any]) -> list[str]:
    """Sizes of the weights; runtimes whose weights are of the same size share a line."""
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


# Trainings that need no compiler.
UNCOMPILED = tuple(name for name in TRAININGS if name != COMPILED)
# The step time of a training is divided by that of another one, and has a limit.
RATIOS = {GATES: PLAIN, COMPILED: PLAIN, TEACHER: GATES, CACHED: GATES}
LIMITS = {GATES: 1.10, COMPILED: 1.10, TEACHER: 1.35, CACHED: 1.03}
# Throughput of gates on batches of similar lengths, divided by that of plain on random batches.
THROUGHPUT_GOAL = 1.5
NOTE = (
    "Data: making the batch. Tokens: without padding. FLOPs: those that real tokens of the trained "
    "model need. Step memory: beside weights and optimizer, in the widest batch."
)


def render_training(result: Mapping[str, Any]) -> str:
    """Describe a benchmark of trainings: model, machine, costs of a step, and ratios.

    Args:
        result: What ``scripts/benchmark_training.py`` writes.
    """
    header = ["batches", "training", "s/step", "of it data", "tokens/s", "padding"]
    header += ["of peak FLOPs", "step memory"]
    rows = [
        [
            cost["batches"],
            TRAININGS[cost["training"]],
            f"{cost['median_seconds']:.3f}",
            f"{cost['data_share']:.2%}",
            f"{cost['tokens_per_second']:,.0f}",
            f"{cost['padding']:.1%}",
            f"{cost['utilisation']:.1%}",
            f"{cost['peak_bytes'] / 1e6:,.0f} MB",
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
