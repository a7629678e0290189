"""Measured speed as tables of a document, between two marks that stay."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bge_pruning.utils.markdown import table
from bge_pruning.utils.record_schemas import SPEED_RESULT, STEPS_RESULT
from bge_pruning.utils.records import check_record, read_record
from bge_pruning.utils.training_cost import CACHED, COMPILED, GATES, PLAIN, TEACHER

SCHEMAS = {"speed": SPEED_RESULT, "steps": STEPS_RESULT}
FIX = "measure again, with benchmark_efficiency.py --baseline or benchmark_training.py"
# Shorter texts are left out of the short table: they measure calls more than arithmetic.
LONG = 128


def render_speed(results: Sequence[Mapping[str, Any]], brief: bool) -> str:
    """Speed of models beside their originals, a table for each.

    Args:
        results: What ``scripts/benchmark_efficiency.py`` has written.
        brief: Only batches of long texts and of real ones.
    """
    header = ["runtime", "texts x tokens", "ms (p95)", "texts/s", "original, ms (p95)", "speed-up"]
    header += ["ideal", "of ideal"]
    parts = []
    for result in results:
        rows = [
            _speed_row(setting)
            for setting in result["settings"]
            if not brief or (setting["batch_size"] > 1 and _is_long(setting["length"]))
        ]
        parts.append(f"{_name(result)}:\n\n{table(header, rows, 2)}")
    return "\n\n".join(parts)


def _is_long(length: int | str) -> bool:
    return length == "real" or length >= LONG


def _speed_row(setting: Mapping[str, Any]) -> list[str]:
    low, high = setting["speedup"]["quartiles"]
    share = f"noise, {setting['rounds']} turns" if setting["noisy"] else f"{setting['share']:.0%}"
    return [
        *(setting["runtime"], f"{setting['batch_size']} x {setting['length']}"),
        *(_latency(setting["model"]), f"{setting['model']['texts_per_s']:,.1f}"),
        _latency(setting["baseline"]),
        f"{setting['speedup']['median']:.2f} ({low:.2f} to {high:.2f})",
        *(f"{setting['ideal']:.2f}", share),
    ]


def _latency(part: Mapping[str, Any]) -> str:
    return f"{part['latency_ms']['median']:,.1f} ({part['latency_ms']['p95']:,.1f})"


def render_steps(results: Sequence[Mapping[str, Any]], brief: bool) -> str:
    """Cost of training steps: the ratios, and a table of what was measured for each result.

    Args:
        results: What ``scripts/benchmark_training.py`` has written.
        brief: The ratios alone.
    """
    parts = [_ratio_table(results)]
    if not brief:
        parts += [f"{_name(result)}:\n\n{_step_table(result)}" for result in results]
    return "\n\n".join(parts)


def _ratio_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results of the same model on the same device share their rows."""
    header = ["model", "batches", "gates / plain", "compiled / plain", "with a teacher / gates"]
    header += ["with a cached teacher / gates", "tokens/s of gates / plain on random batches"]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        for kind, ratios in result["ratios"].items():
            row = rows.setdefault((_name(result), kind), {})
            row |= {name: _quartiles(values) for name, values in ratios.items()}
            if (times := result["throughput"].get(kind)) is not None:
                row["throughput"] = f"{times:.2f}"
    keys = (GATES, COMPILED, TEACHER, CACHED, "throughput")
    cells = [[*place, *(row.get(key, "") for key in keys)] for place, row in rows.items()]
    return table(header, cells, 2)


def _quartiles(values: Sequence[float]) -> str:
    low, median, high = values
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def _step_table(result: Mapping[str, Any]) -> str:
    header = ["batches", "training", "s/step", "tokens/s", "padding", "of peak FLOPs"]
    header += ["memory of the step"]
    names = {PLAIN: "plain", GATES: "gates", COMPILED: "gates, compiled"}
    names |= {TEACHER: "a teacher", CACHED: "a cached teacher"}
    rows = [
        [
            *(cost["batches"], names[cost["training"]]),
            *(f"{cost['median_seconds']:.3f}", f"{cost['tokens_per_second']:,.0f}"),
            *(f"{cost['padding']:.1%}", f"{cost['utilisation']:.1%}"),
            f"{cost['peak_bytes'] / 1e6:,.0f} MB",
        ]
        for cost in result["costs"]
    ]
    return table(header, rows, 2)


def _name(result: Mapping[str, Any]) -> str:
    """The folder, or the sizes of random weights; what it ran on, if that was a GPU."""
    path = Path(result["model"].partition(" (")[0])
    name = "/".join(path.parts[-2:])
    if path.suffix == ".yaml":
        sizes = result["shapes"]["model"] if "shapes" in result else result["shape"]
        name = f"random weights, {sizes}"
    if (batch := result.get("batch_size")) is not None:
        name += f", {batch} texts"
    gpu = result["machine"]["gpu"]
    return name if gpu is None else f"{name}, on {gpu} in {result['dtype']}"


def replace_section(text: str, name: str, content: str) -> str:
    """A document with another text between the marks of a section.

    Args:
        text: Markdown with the lines ``<!-- NAME -->`` and ``<!-- end of NAME -->``.
        name: Of the section.
        content: What is to stand there.

    Raises:
        ValueError: If the document does not have both marks once.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(
            f"the document does not have the lines {start} and {end} once each, in this order. To "
            f"fix, put them where the table belongs."
        )
    pattern = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the benchmarks wrote into a folder, in the order of the files' names.

    Returns:
        ``speed`` and ``steps``.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is no result of either benchmark.
    """
    results: dict[str, list[dict[str, Any]]] = {"speed": [], "steps": []}
    for path in sorted(folder.glob("*.json")):
        result = read_record(path, {}, FIX)
        kind = "speed" if "settings" in result else "steps"
        check_record(result, SCHEMAS[kind], str(path), FIX)
        results[kind].append(result)
    if not any(results.values()):
        raise FileNotFoundError(
            f"{folder} holds no results. To fix, run a benchmark with --output {folder}/NAME.json."
        )
    return results


def write_tables(
    path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]], brief: bool, write: bool
) -> bool:
    """Put the tables into a document.

    Args:
        path: Markdown with the marks of both tables, see :func:`replace_section`.
        results: See :func:`read_results`.
        brief: Short tables.
        write: Change the file; otherwise only look.

    Returns:
        Whether the document had other tables.
    """
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(
            f"{path}: cannot be read as Markdown ({reason}). To fix, name a document with the "
            f"marks of the tables."
        ) from error
    after = replace_section(before, "speed", render_speed(results["speed"], brief))
    after = replace_section(after, "steps", render_steps(results["steps"], brief))
    if write and after != before:
        partial = path.with_suffix(".partial")
        partial.write_text(after, encoding="utf-8")
        os.replace(partial, path)
    return after != before
