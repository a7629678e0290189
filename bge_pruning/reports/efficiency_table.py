"""Tables of speed, memory and the cost of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bge_pruning.reports.markdown import table
from bge_pruning.utils.records import (
    CACHED,
    COMPILED,
    FROZEN,
    GATES,
    PLAIN,
    TEACHER,
    TRAININGS,
    WHOLE,
)

# Share of the ideal speed-up that a pruned model should reach on long texts in batches.
BAR, LEAST_LENGTH, LEAST_BATCH = 0.9, 128, 32


def render_efficiency(result: Mapping[str, Any]) -> str:
    """Render what was measured, a table with a row for each setting, and supported claims.

    ``result`` is that of :func:`bge_pruning.workflows.efficiency_benchmark.benchmark`.
    """
    compared = result["baseline"] is not None
    header = ["runtime", "texts", "tokens", "ms (p95)", "texts/s", "tokens/s"]
    header += ["GFLOPs/token", "activations"]
    header += ["baseline, ms (p95)", "speed-up", "ideal", "of ideal"] if compared else []
    rows = [_row(setting, compared) for setting in result["settings"]]
    lines = [*_head(result), "", table(header, rows) if rows else "nothing was measured", ""]
    lines += [*_memory(result), *_saturation(result["saturation"]), *_left_out(result)]
    return "\n".join(lines + (_claims(result["settings"]) if compared else []))


def _head(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, shape in result["shapes"].items():
        encoder, total = (result["parameters"][name][key] / 1e6 for key in ("encoder", "total"))
        lines.append(
            f"{name + ':':<9} {result[name]}, {shape}, {encoder:,.1f}M parameters in the encoder, "
            f"{total:,.1f}M in all"
        )
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores"
    lines.append(f"{'machine:':<9} {where}, {result['device']}, {result['dtype']}")
    return [*lines, *([f"{'load:':<9} {load}"] if (load := result.get("load")) else [])]


def _row(setting: Mapping[str, Any], compared: bool) -> list[str]:
    model = setting["model"]
    length, memory = str(setting["length"]), model["activation_bytes"]
    if length == "real":
        length = f"real ({model['tokens_per_text']:.1f})"
    cells = [setting["runtime"], str(setting["batch_size"]), length, _latency(model)]
    cells += [f"{model['texts_per_s']:,.1f}", f"{model['tokens_per_s']:,.0f}"]
    cells.append(f"{model['gflops_per_token']:.4f}")
    cells.append("-" if memory is None else f"{memory / 1e6:,.1f} MB")
    if not compared:
        return cells
    low, high = setting["speedup"]["quartiles"]
    share = f"noise, {setting['rounds']} turns" if setting["noisy"] else f"{setting['share']:.0%}"
    speedup = f"{setting['speedup']['median']:.2f} ({low:.2f} to {high:.2f})"
    return [*cells, _latency(setting["baseline"]), speedup, f"{setting['ideal']:.2f}", share]


def _latency(part: Mapping[str, Any]) -> str:
    return f"{part['latency_ms']['median']:,.1f} ({part['latency_ms']['p95']:,.1f})"


def _memory(result: Mapping[str, Any]) -> list[str]:
    """Return sizes of weights; runtimes with the same sizes share a line."""
    runtimes: dict[str, list[str]] = {}
    for runtime, found in result["weight_bytes"].items():
        weights = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in found.items())
        runtimes.setdefault(weights, []).append(runtime)
    return [f"weights ({', '.join(names)}): {weights}" for weights, names in runtimes.items()]


def _saturation(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for runtime, models in found.items():
        parts = (
            f"{name} {best['tokens_per_s']:,.0f} tokens/s, {best['texts_per_s']:,.1f} texts/s "
            f"({best['batch_size']} x {best['length']})"
            for name, best in models.items()
        )
        lines.append(f"highest throughput ({runtime}): {'; '.join(parts)}")
    return lines


def _left_out(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"left out, needs about {s['needed_bytes'] / 2**30:.1f} GiB and "
        f"{s['free_bytes'] / 2**30:.1f} GiB are free: {s['runtime']}, "
        f"{s['batch_size']} x {s['length']}"
        for s in result["too_large"]
    ]
    if result["too_long"]:
        limit, lengths = result["max_length"], ", ".join(map(str, result["too_long"]))
        lines.append(f"left out, beyond the limit of {limit} tokens a text: {lengths}")
    return lines


def _claims(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    batches = [s for s in settings if s["batch_size"] >= LEAST_BATCH and s["length"] != "real"]
    long = [s for s in batches if s["length"] >= LEAST_LENGTH]
    clear = [s for s in long if not s["noisy"]]
    lines = [
        f"{s['runtime']}, {s['batch_size']} texts of {s['length']} tokens: {s['share']:.0%} of the "
        f"ideal speed-up, {'at least' if s['share'] >= BAR else 'below'} {BAR:.0%}"
        for s in clear
    ]
    if noisy := len(long) - len(clear):
        fix = "measure longer (--seconds), or on a quiet machine"
        lines.append(f"{noisy} of {len(long)} long settings are too noisy for a claim: {fix}")
    return lines


# Trainings that are measured unless others are asked for.
USUAL = (PLAIN, GATES, TEACHER, CACHED)
# The step time of a training is given relative to that of another, most with a limit.
RATIOS = {GATES: PLAIN, COMPILED: PLAIN} | dict.fromkeys((TEACHER, CACHED, WHOLE, FROZEN), GATES)
LIMITS = {GATES: 1.10, COMPILED: 1.10, TEACHER: 1.35, CACHED: 1.03}
# Tokens per second of gates on batches of similar lengths, relative to plain on random batches.
THROUGHPUT_GOAL = 1.5
NOTE = (
    "Data: making the batch. Tokens: without padding. FLOPs: those that real tokens of the trained "
    "model need. Step memory: beside weights and optimizer, in the widest batch."
)


def render_training(result: Mapping[str, Any]) -> str:
    """Render what the benchmark of trainings measured, on what, and the ratios."""
    header = ["batches", "training", "s/step", "of it data", "tokens/s", "padding"]
    header += ["of peak FLOPs", "step memory"]
    rows = []
    for cost in result["costs"]:
        time = [f"{cost['median_seconds']:.3f}", f"{cost['data_share']:.2%}"]
        tokens = [f"{cost['tokens_per_second']:,.0f}", f"{cost['padding']:.1%}"]
        use = [f"{cost['utilisation']:.1%}", f"{cost['peak_bytes'] / 1e6:,.0f} MB"]
        rows.append([cost["batches"], TRAININGS[cost["training"]], *time, *tokens, *use])
    lines = [_describe(result), "", table(header, rows, 2), "", NOTE]
    if any(result["ratios"].values()):
        lines += ["", "Times on the same batch, median (quartiles):", "", _ratios(result)]
    if result["throughput"]:
        lines.append("")
    for kind, value in result["throughput"].items():
        goal = f" (goal: {THROUGHPUT_GOAL} or more)" if kind == "length groups" else ""
        lines.append(
            f"Tokens/s of gates on {kind}: {value:.2f} times plain on random batches{goal}."
        )
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
    limits = {name: f" (limit {limit:.2f})" for name, limit in LIMITS.items()}
    header = ["batches", *(f"{n} / {RATIOS[n]}{limits.get(n, '')}" for n in measured)]
    header += ["reading the cache / gates"] if result["reading"] else []
    rows = []
    for kind, ratios in result["ratios"].items():
        rows.append([kind, *(_spread(ratios[name]) for name in measured)])
        if result["reading"]:
            rows[-1].append(_spread(result["reading"][kind], digits=5))
    return table(header, rows)


def _spread(quartiles: Sequence[float], digits: int = 3) -> str:
    low, median, high = (f"{value:.{digits}f}" for value in quartiles)
    return f"{median} ({low} to {high})"
