"""Several evaluations side by side: what each keeps, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bge_pruning.reports.markdown import table
from bge_pruning.utils.record_schemas import EVALUATION as EVALUATION_RECORD
from bge_pruning.utils.record_schemas import PARAMETERS, SPEED
from bge_pruning.utils.records import Optional, read_record
from bge_pruning.utils.tasks import main_scores

EVALUATION = "evaluation.json"
ORIGINAL = "original"
# With both models counted, and speed measured or not.
COMPARED = {
    **EVALUATION_RECORD,
    "parameters": {"model": PARAMETERS, "baseline": Optional(PARAMETERS)},
    "speed": Optional(SPEED),
}
FIX = "run scripts/evaluate_model.py with --baseline"
# A task in a mode.
Key = tuple[str, str]


@dataclass(frozen=True)
class Candidate:
    """A model to choose, from one evaluation or from several with different seeds.

    Attributes:
        name: Its name.
        scores: Main score of each run, by task and mode.
        kept: Mean over tasks and modes of the share of the original's score, for each run.
        floor: The same of the floor, lowest over the runs: what no training at all reaches.
        encoder: Parameters of its encoder.
        total: All its parameters.
        latency: Time of one text as a share of the original's, median over the runs; ``None`` if it
            was not measured.
        throughput: Texts per second, in times of the original's; or ``None``.
    """

    name: str
    scores: dict[Key, list[float]]
    kept: list[float]
    floor: float
    encoder: int
    total: int
    latency: float | None
    throughput: float | None


def read_candidates(results: Sequence[str]) -> tuple[list[Candidate], list[Key]]:
    """Read evaluations; the original that they share comes first.

    Args:
        results: ``NAME=PATH`` or ``PATH``; a path is a results folder or an evaluation file. Those
            with the same name are runs of one thing with different seeds.

    Returns:
        The original and the others in order, and the tasks that all of them were evaluated on.

    Raises:
        FileNotFoundError: If a path holds no evaluation.
        ValueError: If a file is none, is there twice, or has no baseline, a model is called as the
            original, or they have no task or original in common.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    named = [_name_and_path(text) for text in results]
    _check_names(named)
    for name, path in named:
        groups.setdefault(name, []).append(_read(path))
    everything = [evaluation for group in groups.values() for evaluation in group]
    keys = _common_keys(everything)
    original = _original(everything, keys)
    return [original, *(_candidate(n, g, keys, original) for n, g in groups.items())], keys


def _name_and_path(text: str) -> tuple[str, Path]:
    """Name and evaluation file; the name of a results folder is that of its evaluation too."""
    name, _, path = text.partition("=")
    if not path or Path(text).exists():  # a folder's name may hold a =
        name, path = "", text
    file = Path(path) / EVALUATION if Path(path).is_dir() else Path(path)
    if not name:
        name = file.absolute().parent.name if file.name == EVALUATION else file.stem
    return name, file


def _check_names(named: Sequence[tuple[str, Path]]) -> None:
    """Refuse what would be counted twice."""
    files = [file.resolve() for _, file in named]
    for name, file in named:
        if name == ORIGINAL:
            raise ValueError(
                f"{file} would be called {ORIGINAL}, as the model that all are compared with. To "
                f"fix, give it another name: NAME={file}."
            )
        if files.count(file.resolve()) > 1:
            raise ValueError(
                f"{file} is there twice: it would count as two runs. To fix, name it once."
            )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file. To fix, give a results folder or the output of "
            f"scripts/evaluate_model.py; a run is evaluated by that script first."
        )
    evaluation = read_record(file, COMPARED, FIX)
    if not _is_complete(evaluation):
        raise ValueError(
            f"{file} has scores without a share of the original's. To fix, run "
            f"scripts/evaluate_model.py with --baseline, and with modes that the baseline has."
        )
    return {**evaluation, "file": str(file)}


def _is_complete(evaluation: Mapping[str, Any]) -> bool:
    """Whether every score has a share of the original's, and both models were counted."""
    entries = main_scores(evaluation)
    numbers = [entry[key] for entry in entries for key in ("retention", "baseline")]
    return bool(numbers) and None not in numbers and bool(evaluation["parameters"]["baseline"])


def _scores(evaluation: Mapping[str, Any], which: str = "value") -> dict[Key, float]:
    return {(entry["task"], entry["mode"]): entry[which] for entry in main_scores(evaluation)}


def _common_keys(evaluations: Sequence[Mapping[str, Any]]) -> list[Key]:
    found = [_scores(evaluation) for evaluation in evaluations]
    keys = [key for key in found[0] if all(key in scores for scores in found)]
    if not keys:
        raise ValueError(
            "the evaluations have no task and mode in common. To fix, evaluate all models on the "
            "same tasks."
        )
    return keys


def _original(evaluations: Sequence[Mapping[str, Any]], keys: Sequence[Key]) -> Candidate:
    """The baseline of all, once it is sure that it is the same one."""
    first = evaluations[0]
    expected = _scores(first, "baseline")
    for other in evaluations[1:]:
        scores = _scores(other, "baseline")
        for key in keys:
            if abs(scores[key] - expected[key]) > 1e-3:
                raise ValueError(
                    f"{first['file']} and {other['file']} have different originals: on {key[0]} "
                    f"({key[1]}) they score {expected[key]:.4f} and {scores[key]:.4f}. To fix, "
                    f"evaluate with the same --baseline and --max-length."
                )
    counts = first["parameters"]["baseline"]
    measured = 1.0 if any(evaluation["speed"] for evaluation in evaluations) else None
    scores = {key: [expected[key]] for key in keys}
    floor = min(_floor(evaluation, keys) for evaluation in evaluations)
    return Candidate(
        ORIGINAL, scores, [1.0], floor, counts["encoder"], counts["total"], measured, measured
    )


def _floor(evaluation: Mapping[str, Any], keys: Sequence[Key]) -> float:
    floors, originals = _scores(evaluation, "floor"), _scores(evaluation, "baseline")
    return fmean(floors[key] / originals[key] for key in keys)


def _candidate(
    name: str,
    evaluations: Sequence[Mapping[str, Any]],
    keys: Sequence[Key],
    original: Candidate,
) -> Candidate:
    found = [_scores(evaluation) for evaluation in evaluations]
    scores = {key: [run[key] for run in found] for key in keys}
    kept = [fmean(run[key] / original.scores[key][0] for key in keys) for run in found]
    counts = [evaluation["parameters"]["model"] for evaluation in evaluations]
    if len({count["total"] for count in counts}) > 1:
        raise ValueError(
            f"the runs called {name} have {' and '.join(str(c['total']) for c in counts)} "
            f"parameters: they are no repetitions. To fix, give different models different names."
        )
    speeds = [evaluation["speed"] for evaluation in evaluations if evaluation["speed"]]
    return Candidate(
        name,
        scores,
        kept,
        min(_floor(evaluation, keys) for evaluation in evaluations),
        counts[0]["encoder"],
        counts[0]["total"],
        _median([speed["latency_ms"]["ratio"] for speed in speeds]),
        _median([speed["throughput_texts_per_s"]["ratio"] for speed in speeds]),
    )


def _median(values: Sequence[float]) -> float | None:
    from statistics import median

    return median(values) if values else None


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Which of several choices are worth it: all cheaper ones are worse.

    Args:
        costs: Smaller is better.
        qualities: Larger is better.

    Returns:
        Their indices, the cheapest first.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    front: list[int] = []
    for index in order:
        if not front or qualities[index] > qualities[front[-1]]:
            front.append(index)
    return front


def render_comparison(candidates: Sequence[Candidate], keys: Sequence[Key]) -> str:
    """A Markdown page: a table of costs and of what is kept, and one of every score."""
    titles = [f"{task}, {mode}" for task, mode in keys]
    scores = [[c.name, *(_span(c.scores[key], ".4f") for key in keys)] for c in candidates]
    parts = [
        "# Comparison",
        "Kept is the mean over tasks and modes of score / original's score, floor the same of the "
        "larger floor (random weights, word embeddings). Time and texts per second are in times of "
        "the original's, measured in turns in one process. Of several runs with one name the mean "
        "is given, and in brackets the lowest and the highest.",
        table(summary_header(), summary_rows(candidates)),
        table(["model", *titles], scores),
    ]
    return "\n\n".join(parts) + "\n"


def summary_header() -> list[str]:
    """Names of the cells of :func:`summary_rows`."""
    costs = ("encoder", "in all", "time of one text", "texts per second")
    return ["model", "runs", *costs, "floor", "kept"]


def summary_rows(candidates: Sequence[Candidate]) -> list[list[str]]:
    """A row for each candidate."""
    return [
        [
            c.name,
            str(len(c.kept)),
            f"{c.encoder / 1e6:.1f}M",
            f"{c.total / 1e6:.1f}M",
            *("-" if value is None else f"{value:.2f} x" for value in (c.latency, c.throughput)),
            f"{c.floor:.1%}",
            _span(c.kept, ".1%"),
        ]
        for c in candidates
    ]


def _span(values: Sequence[float], style: str) -> str:
    """A value, or the mean of several with the lowest and the highest."""
    mean = format(fmean(values), style)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), style)} to {format(max(values), style)})"


def describe_comparison(candidates: Sequence[Candidate], keys: Sequence[Key]) -> dict[str, Any]:
    """The same, JSON-ready."""
    return {
        "tasks": [{"task": task, "mode": mode} for task, mode in keys],
        "candidates": [
            {
                "name": c.name,
                "kept": c.kept,
                "floor": c.floor,
                "scores": [c.scores[key] for key in keys],
                "parameters": {"encoder": c.encoder, "total": c.total},
                "latency_ratio": c.latency,
                "throughput_ratio": c.throughput,
            }
            for c in candidates
        ],
    }
