"""Writes ``report.md``: what a pruning run did, on one page, in words, tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from bge_pruning.utils.evaluation import refuse_existing, write_text
from bge_pruning.utils.score_table import render_scores
from bge_pruning.utils.tasks import main_scores
from bge_pruning.utils.visualization import AXIS_TITLES, plot_gates, plot_sparsity, plot_summary

PICTURES = {
    "summary.png": "Quality, parameters and speed beside the original model",
    "gates.png": "Probability that each gate is open, and what the cut kept",
    "sparsity.png": "Expected and target sparsity while training, and the task loss",
}
# Above this distance, a share of the axis, the cut removed what the gates had not decided on.
WORST_DISTANCE = 0.01


@dataclass
class Inputs:
    """What a results folder holds; ``None`` for a file that is not there."""

    evaluation: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    history: list[dict[str, Any]] | None = None
    gates: dict[str, Any] | None = None
    commands: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def write_report(
    results_folder: str | Path, *, commands: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Writes ``report.md`` and its pictures into a results folder.

    Read are ``evaluation.json``, ``pruning.json``, ``metrics.jsonl`` (one history row a line),
    ``gates.npz`` (open probabilities, and booleans under ``<axis>_kept``) and ``commands.txt`` (one
    command a line). A file that is missing costs its sections, and the report says so.

    Args:
        results_folder: Folder with the inputs.
        commands: Commands that reproduce the run; ``commands.txt`` is then not read.
        overwrite: Whether an existing report and its pictures may be replaced.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: If the folder has neither ``evaluation.json`` nor ``pruning.json``.
        FileExistsError: If a report is there and ``overwrite`` is false.
        ValueError: If a file is no JSON, or lacks a key; the message names both.
    """
    folder = Path(results_folder)
    report = folder / "report.md"
    inputs = _read(folder, commands)
    refuse_existing([report, *(folder / name for name in PICTURES)], overwrite=overwrite)
    try:
        text = "\n\n".join(_sections(inputs, _pictures(inputs))) + "\n"
        _draw(folder, inputs)
    except KeyError as error:
        raise ValueError(
            f"{folder}: the results have no {error}. To fix, write them again with this version."
        ) from error
    write_text(report, text)
    return report


def _read(folder: Path, commands: Sequence[str]) -> Inputs:
    """Reads what is there."""
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "evaluation": ("evaluation.json", _read_json),
        "pruning": ("pruning.json", _read_json),
        "history": ("metrics.jsonl", _read_lines),
        "gates": ("gates.npz", _read_gates),
    }
    inputs = Inputs(commands=list(commands))
    for name, (file, reader) in readers.items():
        if (folder / file).is_file():
            setattr(inputs, name, reader(folder / file))
        else:
            inputs.missing.append(file)
    if inputs.evaluation is None and inputs.pruning is None:
        raise FileNotFoundError(
            f"{folder} holds neither evaluation.json nor pruning.json. To fix, give the results "
            "folder of a run that was extracted or evaluated."
        )
    _find_commands(folder, inputs)
    return inputs


def _find_commands(folder: Path, inputs: Inputs) -> None:
    """Commands given to the function, or else recorded in the folder, or else in the evaluation."""
    if not inputs.commands and (folder / "commands.txt").is_file():
        lines = _read_text(folder / "commands.txt").splitlines()
        inputs.commands = [line for line in lines if line.strip()]
    elif not inputs.commands:
        inputs.missing.append("commands.txt")
        recorded = (inputs.evaluation or {}).get("command")
        inputs.commands = [recorded] if recorded else []


def _read_json(path: Path) -> Any:
    content = _parse(_read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON object. To fix, write it again.")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}). To fix, write it again.") from error


def _read_lines(path: Path) -> list[Any]:
    lines = _read_text(path).splitlines()
    return [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error.msg}). To fix, write it again.") from error


def _read_gates(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        # Opened here: np.load leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, OSError, TypeError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path} holds no arrays ({error}). To fix, write it again.") from error


def _pictures(inputs: Inputs) -> list[str]:
    """Names of the pictures that the inputs allow."""
    needs = {
        "summary.png": bool(inputs.evaluation and main_scores(inputs.evaluation)),
        "gates.png": inputs.gates is not None,
        "sparsity.png": bool(inputs.history),
    }
    return [name for name, there in needs.items() if there]


def _draw(folder: Path, inputs: Inputs) -> None:
    """Draws the pictures that the inputs allow."""
    if inputs.evaluation and main_scores(inputs.evaluation):
        plot_summary(inputs.evaluation, folder / "summary.png")
    if inputs.gates is not None:
        values = {name: array for name, array in inputs.gates.items() if not name.endswith("_kept")}
        kept = {
            axis: inputs.gates[f"{axis}_kept"] for axis in values if f"{axis}_kept" in inputs.gates
        }
        plot_gates(values, kept, folder / "gates.png")
    if inputs.history:
        plot_sparsity(inputs.history, folder / "sparsity.png")


def _sections(inputs: Inputs, pictures: Sequence[str]) -> list[str]:
    """The report, a paragraph or table an entry."""
    parts = [f"# {_title(inputs)}", _summary(inputs)]
    parts += _picture("summary.png", pictures)
    parts += _parameters(inputs)
    if inputs.evaluation is not None:
        parts += render_scores(inputs.evaluation)
        parts += _speed(inputs.evaluation.get("speed"))
    if inputs.pruning is not None:
        parts += _constraint(inputs.pruning["constraint"])
        parts += _kept(inputs.pruning)
    parts += _picture("gates.png", pictures) + _picture("sparsity.png", pictures)
    parts += _reproduction(inputs)
    if inputs.missing:
        parts.append(
            f"Left out, because the folder does not hold them: {', '.join(inputs.missing)}."
        )
    return parts


def _title(inputs: Inputs) -> str:
    if inputs.pruning is not None:
        return f"Pruned {Path(inputs.pruning['source']['base_model']).name}"
    return f"Evaluation of {Path(inputs.evaluation['model']).name}"  # type: ignore[index]


def _counts(inputs: Inputs) -> dict[str, Mapping[str, int]]:
    """Parameters by part of the original and of the pruned model, as far as they are known."""
    if inputs.pruning is not None:
        counts = inputs.pruning["parameters"]
        return {"original": counts["source"], "pruned": counts["extracted"]}
    counts = inputs.evaluation["parameters"]  # type: ignore[index]
    both = {"original": counts["baseline"], "pruned": counts["model"]}
    return {name: count for name, count in both.items() if count}


def _summary(inputs: Inputs) -> str:
    """The result in a paragraph."""
    counts = _counts(inputs)
    sentences = []
    if len(counts) == 2:
        shares = {
            part: counts["pruned"][part] / counts["original"][part] for part in ("encoder", "total")
        }
        sentences.append(
            f"The pruned model has {_millions(counts['pruned']['total'])} parameters, "
            f"{shares['total']:.1%} of the original's {_millions(counts['original']['total'])}; "
            f"of the encoder it keeps {shares['encoder']:.1%}."
        )
    if inputs.evaluation is not None:
        sentences += [_task_sentence(task) for task in main_scores(inputs.evaluation)]
        if speed := inputs.evaluation.get("speed"):
            ratio = speed["throughput_texts_per_s"]["ratio"]
            sentences.append(
                f"It encodes {ratio:.2f} times as many texts a second on {speed['device']}."
            )
    return " ".join(sentences)


def _task_sentence(task: Mapping[str, Any]) -> str:
    on = f"On {task['task']} ({task['mode']}) it scores {task['value']:.4f}"
    if task["retention"] is None:
        return f"{on} (floor {task['floor']:.4f})."
    above = task["retention_above_floor"]
    rest = (
        ""
        if above is None
        else f", and {above:.1%} of what lies above the floor of {task['floor']:.4f}"
    )
    return f"{on} against {task['baseline']:.4f}: {task['retention']:.1%} is kept{rest}."


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} million"


def _picture(name: str, pictures: Sequence[str]) -> list[str]:
    return [f"![{PICTURES[name]}]({name})"] if name in pictures else []


def _parameters(inputs: Inputs) -> list[str]:
    counts = _counts(inputs)
    rows = []
    for part in ("encoder", "embeddings", "pooler", "heads", "total"):
        numbers = [counts[name][part] for name in counts]
        density = (
            [f"{numbers[1] / numbers[0]:.1%}" if numbers[0] else "-"] if len(numbers) == 2 else []
        )
        rows.append([part, *(f"{number:,}" for number in numbers), *density])
    header = ["part", *counts, *(["kept"] if len(counts) == 2 else [])]
    parts = ["## Parameters", _table(header, rows)]
    if inputs.pruning is not None:
        shapes = inputs.pruning["source_shape"], inputs.pruning["shape"]
        sizes = [[f"`{key}`", shapes[0].get(key, "-"), shapes[1][key]] for key in shapes[1]]
        parts.append(_table(["shape", "original", "pruned"], sizes))
    return parts


def _speed(speed: Mapping[str, Any] | None) -> list[str]:
    if not speed:
        return ["## Speed", "Not measured."]
    latency, rate = speed["latency_ms"], speed["throughput_texts_per_s"]
    rows = []
    for name, key in (("median", "median"), ("95th percentile", "p95")):
        cells = [f"{latency[which][key]:.1f} ms" for which in ("baseline", "model")]
        ratio = f"{latency['ratio']:.2f} {_quartiles(latency)}" if key == "median" else "-"
        rows.append([f"one text, {name}", *cells, ratio])
    cells = [f"{rate[which]:.0f} texts/s" for which in ("baseline", "model")]
    rows.append(
        ["batches of 32, sorted by length", *cells, f"{rate['ratio']:.2f} {_quartiles(rate)}"]
    )
    return [
        "## Speed",
        f"Measured in turns in one process on {speed['device']} with {speed['threads']} threads; "
        "in brackets the quartiles of the ratio.",
        _table(["", "original", "pruned", "pruned / original"], rows),
    ]


def _quartiles(figures: Mapping[str, Any]) -> str:
    low, high = figures["ratio_iqr"]
    return f"({low:.2f} to {high:.2f})"


def _constraint(constraint: Mapping[str, Mapping[str, float]]) -> list[str]:
    """How far the gates were from the target when the cut was made."""
    names = ("expected_sparsity", "target_sparsity", "realised_sparsity")
    rows, distances = [], {}
    for axis, values in constraint.items():
        distances[axis] = abs(values["expected_sparsity"] - values["target_sparsity"])
        cells = [f"{values[name]:.2%}" for name in names]
        rows.append([AXIS_TITLES.get(axis, axis), *cells, f"{100 * distances[axis]:.2f} points"])
    parts = ["## How the constraint was met"]
    if not rows:
        return [*parts, "No axis was pruned by gates."]
    header = ["removed", "expected by the gates", "target", "after the cut", "expected - target"]
    parts.append(_table(header, rows))
    worst = max(distances, key=distances.__getitem__)
    distance = f"{100 * distances[worst]:.2f} points of sparsity ({AXIS_TITLES.get(worst, worst)})"
    if not distances[worst] <= WORST_DISTANCE:  # a NaN is as bad
        return [
            *parts,
            f"> **WARNING: the gates never reached the target: they were {distance} away.** The "
            "cut still gave the exact target, but it removed what the gates had not decided to "
            "remove. Train longer, or raise the learning rate of the gates and the multipliers.",
        ]
    return [*parts, f"The largest distance between gates and target is {distance}."]


def _kept(pruning: Mapping[str, Any]) -> list[str]:
    """Which layers stay; units and dimensions are too many to list."""
    kept = pruning["kept"].get("layer")
    if kept is None or len(kept) == pruning["source_shape"]["num_hidden_layers"]:
        return []
    return [f"Layers that stay, counted from 0: {', '.join(str(layer) for layer in kept)}."]


def _reproduction(inputs: Inputs) -> list[str]:
    parts = ["## How to reproduce"]
    if inputs.commands:
        parts.append("```bash\n" + "\n".join(inputs.commands) + "\n```")
    if inputs.pruning is not None:
        parts.append(f"Seed of the run: {inputs.pruning['seed']}.")
    if inputs.evaluation is not None:
        versions = inputs.evaluation["versions"].items()
        parts.append(
            "Versions: " + ", ".join(f"{name} {number}" for name, number in versions) + "."
        )
    return parts


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)
