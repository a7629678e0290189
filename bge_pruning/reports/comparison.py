"""Several models beside each other: seeds grouped, shares kept, floors and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple, TypeVar

from bge_pruning.reports.study_records import StudyScore
from bge_pruning.utils.json_records import Record, read_record
from bge_pruning.utils.records import (
    Entry,
    EvaluationRecord,
    Latency,
    Parameters,
    Speed,
    Throughput,
)

EVALUATION = "evaluation.json"
ORIGINAL = "original"
FIX = "run scripts/evaluate_model.py with --baseline"
CONFIDENCE = 0.95
# A task in a mode.
Key = tuple[str, str]
Score = TypeVar("Score", Entry, StudyScore)


class BothCounted(Record):
    """Parameters of a model, and of its baseline if there is one."""

    model: Parameters
    baseline: Parameters | None


class ComparedRecord(EvaluationRecord):
    """An evaluation with parameters, and with speed or the note that it was not measured."""

    parameters: BothCounted
    speed: Speed | None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``half`` is half the width of its 95 % interval by Student's t."""

    mean: float
    half: float | None
    count: int


def estimate_mean(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval ``mean +- t(0.975, n - 1) s / sqrt(n)``; ``None`` without values.

    The interval is over seeds: it says how far another choice of seeds may lead, not another
    choice of queries.
    """
    count = len(values)
    if count < 2:
        return Estimate(values[0], None, 1) if values else None
    from scipy.stats import t as student

    quantile = float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(fmean(values), quantile * stdev(values) / count**0.5, count)


def by_key(scores: Iterable[Score]) -> dict[Key, Score]:
    """Scores by task and mode."""
    return {(score.task, score.mode): score for score in scores}


def common_keys(runs: Sequence[Iterable[Key]]) -> list[Key]:
    """The tasks and modes that every run was judged by, in the order of the first one."""
    others = [set(run) for run in runs[1:]]
    return [key for key in runs[0] if all(key in other for other in others)]


def percent(estimate: Estimate | None, digits: int = 1) -> str:
    """An estimate of a share in percent, ``-`` if there is none."""
    if estimate is None:
        return "-"
    text = f"{100 * estimate.mean:.{digits}f}"
    return text if estimate.half is None else f"{text} ± {100 * estimate.half:.{digits}f}"


def pareto_front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices of the choices that are better than all cheaper ones, the cheapest first."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i]))
    front: list[int] = []
    for index in order:
        if not front or qualities[index] > qualities[front[-1]]:
            front.append(index)
    return front


@dataclass(frozen=True)
class Ratio:
    """A speed divided by the original's: the median over runs, lowest and highest quartile."""

    value: float
    quartiles: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.quartiles is None:
            return f"{self.value:.2f} x"
        low, high = self.quartiles
        return f"{self.value:.2f} x ({low:.2f} to {high:.2f})"


@dataclass(frozen=True)
class Candidate:
    """A model to choose, from one evaluation or from several with different seeds."""

    name: str
    scores: dict[Key, list[float]]  # main score of each run
    kept: list[float]  # mean share of the original's scores, for each run
    floor: float  # the same share of the floor, which needs no training; the lowest over the runs
    encoder: int  # parameters of the encoder
    total: int  # all parameters
    latency: Ratio | None  # of one text, as a share of the original's
    throughput: Ratio | None  # texts per second divided by those of the original


class Comparison(NamedTuple):
    """Models side by side; the original comes first.

    Attributes:
        keys: The tasks and modes that all of them were judged by, which are compared.
        left_out: The other tasks and modes, and the names of the models that lack them.
    """

    candidates: list[Candidate]
    keys: list[Key]
    left_out: dict[Key, list[str]]


@dataclass(frozen=True)
class _Run:
    """An evaluation and its file."""

    file: Path
    record: ComparedRecord

    def numbers(self, which: str = "value") -> dict[Key, float]:
        """One number of each main score, by task and mode."""
        scores = by_key(self.record.main_scores())
        return {key: getattr(entry, which) for key, entry in scores.items()}

    def floor(self, keys: Sequence[Key]) -> float:
        """Mean share of the original's score that the larger floor reaches."""
        floors, originals = self.numbers("floor"), self.numbers("baseline")
        return fmean(floors[key] / originals[key] for key in keys)


def read_candidates(results: Sequence[str]) -> Comparison:
    """Read evaluations, and find what they have in common.

    Args:
        results: ``NAME=PATH`` or ``PATH``; a path is a results folder or an evaluation file. Those
            with the same name are runs of one thing with different seeds.
    """
    named = [_name_and_path(text) for text in results]
    _check_names(named)
    groups: dict[str, list[_Run]] = {}
    for name, path in named:
        groups.setdefault(name, []).append(_read(path))
    runs = [run for group in groups.values() for run in group]
    keys = common_keys([run.numbers() for run in runs])
    if not keys:
        raise ValueError(
            "the evaluations have no task and mode in common. To fix, evaluate all models on the "
            "same tasks."
        )
    original = _original(runs, keys)
    candidates = [original, *(_candidate(n, g, keys, original) for n, g in groups.items())]
    return Comparison(candidates, keys, _left_out(groups, keys))


def _left_out(groups: Mapping[str, Sequence[_Run]], keys: Sequence[Key]) -> dict[Key, list[str]]:
    """Tasks and modes that only some models were judged by, and which were not."""
    scored = {name: [run.numbers() for run in runs] for name, runs in groups.items()}
    every = dict.fromkeys(key for runs in scored.values() for run in runs for key in run)
    return {
        key: [name for name, runs in scored.items() if not all(key in run for run in runs)]
        for key in every
        if key not in keys
    }


def describe_left_out(left_out: Mapping[Key, Sequence[str]]) -> list[str]:
    """A sentence for each set of models that lack scores of others."""
    together: dict[tuple[str, ...], list[str]] = {}
    for (task, mode), names in left_out.items():
        together.setdefault(tuple(names), []).append(f"{task} ({mode})")
    return [
        f"Left out, because {', '.join(names)} lack{'s' if len(names) == 1 else ''} them: "
        f"{', '.join(scores)}."
        for names, scores in together.items()
    ]


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
    """Refuse the name of the original, and files that would be counted twice."""
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


def _read(file: Path) -> _Run:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file. To fix, give a results folder or the output of "
            f"scripts/evaluate_model.py; a run is evaluated by that script first."
        )
    record = read_record(file, ComparedRecord, FIX)
    numbers = [n for entry in record.main_scores() for n in (entry.retention, entry.baseline)]
    if not numbers or None in numbers or record.parameters.baseline is None:
        raise ValueError(
            f"{file} has scores without a share of the original's. To fix, run "
            f"scripts/evaluate_model.py with --baseline, and with modes that the baseline has."
        )
    return _Run(file, record)


def _original(runs: Sequence[_Run], keys: Sequence[Key]) -> Candidate:
    """The common baseline, after a check that all runs have the same one."""
    first, expected = runs[0], runs[0].numbers("baseline")
    for other in runs[1:]:
        scores = other.numbers("baseline")
        for key in keys:
            if abs(scores[key] - expected[key]) > 1e-3:
                raise ValueError(
                    f"{first.file} and {other.file} have different originals: on {key[0]} "
                    f"({key[1]}) they score {expected[key]:.4f} and {scores[key]:.4f}. To fix, "
                    f"evaluate with the same --baseline and --max-length."
                )
    counts = first.record.parameters.baseline
    measured = Ratio(1.0) if any(run.record.speed for run in runs) else None
    scores, floor = {key: [expected[key]] for key in keys}, min(run.floor(keys) for run in runs)
    sizes = (counts.encoder, counts.total)
    return Candidate(ORIGINAL, scores, [1.0], floor, *sizes, measured, measured)


def _candidate(name: str, runs: list[_Run], keys: list[Key], original: Candidate) -> Candidate:
    found = [run.numbers() for run in runs]
    counts = [run.record.parameters.model for run in runs]
    if len({count.total for count in counts}) > 1:
        raise ValueError(
            f"the runs called {name} have {' and '.join(str(c.total) for c in counts)} "
            f"parameters: they are no repetitions. To fix, give different models different names."
        )
    speeds = [run.record.speed for run in runs if run.record.speed is not None]
    return Candidate(
        name=name,
        scores={key: [scores[key] for scores in found] for key in keys},
        kept=[fmean(s[key] / original.scores[key][0] for key in keys) for s in found],
        floor=min(run.floor(keys) for run in runs),
        encoder=counts[0].encoder,
        total=counts[0].total,
        latency=_ratio([s.latency_ms for s in speeds]),
        throughput=_ratio([s.throughput_texts_per_s for s in speeds]),
    )


def _ratio(figures: Sequence[Latency | Throughput]) -> Ratio | None:
    if not figures:
        return None
    quartiles = [f.ratio_iqr for f in figures if f.ratio_iqr is not None]
    spread = (min(q[0] for q in quartiles), max(q[1] for q in quartiles)) if quartiles else None
    return Ratio(median(f.ratio for f in figures), spread)


def summary_header() -> list[str]:
    """Names of the cells of :func:`summary_rows`."""
    costs = ("encoder", "in all", "time of one text", "texts per second")
    return ["model", "runs", *costs, "floor", "kept"]


def summary_rows(candidates: Sequence[Candidate]) -> list[list[str]]:
    """A row for each candidate."""
    rows = []
    for c in candidates:
        sizes = [f"{count / 1e6:.1f}M" for count in (c.encoder, c.total)]
        times = ["-" if x is None else str(x) for x in (c.latency, c.throughput)]
        shares = [f"{c.floor:.1%}", span(c.kept, ".1%")]
        rows.append([c.name, str(len(c.kept)), *sizes, *times, *shares])
    return rows


def span(values: Sequence[float], style: str) -> str:
    """A value, or the mean of several with the lowest and the highest."""
    mean = format(fmean(values), style)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), style)} to {format(max(values), style)})"
