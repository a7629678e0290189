"""Evaluates a model beside the unpruned one and two floors, and measures its cost."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bge_pruning.evaluation import statistics
from bge_pruning.evaluation.encoders import (
    AnyEncoder,
    OnnxEncoder,
    SentenceTransformerEncoder,
    TextEncoder,
    count_parameters,
    fetch_models,
    load_encoder,
    untrained_encoder,
)
from bge_pruning.evaluation.floors import WordEmbeddings
from bge_pruning.evaluation.onnx_encoder import onnx_files
from bge_pruning.evaluation.scoring import Score, Scores, score_tasks
from bge_pruning.evaluation.search import check_modes, task_prompt
from bge_pruning.evaluation.task_means import describe_means
from bge_pruning.evaluation.tasks import RETRIEVAL, SIMILARITY, Task
from bge_pruning.model_io.projection import FOLDER as PROJECTION
from bge_pruning.reports.report_tables import render_scores
from bge_pruning.utils.environment import check_device, collect_versions, default_device
from bge_pruning.utils.files import evaluation_files, refuse_existing, write_json, write_text
from bge_pruning.utils.model_analysis import measure_peak_bytes, measure_speed
from bge_pruning.utils.records import Entry, EvaluationRecord, Speed

# Files of weights that this project and sentence-transformers read.
WEIGHT_FILES = (
    f"model*.safetensors pytorch_model*.bin *_linear.pt {PROJECTION}/model.safetensors".split()
)
FLOORS = ("random_weights", "word_embeddings")
log = logging.getLogger(__name__)


def measure_cost(model: AnyEncoder, baseline: AnyEncoder, texts: Sequence[str]) -> Speed:
    """Measure speed and memory of two models: of the weights, and of other tensors in a batch.

    The latter is ``None`` for ONNX Runtime, which does not report it.
    """
    both = {"model": model, "baseline": baseline}
    batch = list(texts[: model.batch_size])
    memory: dict[str, Any] = {
        "texts": len(batch),
        "tokens": int(model.tokenize(batch).lengths.max()),
    }
    for name, encoder in both.items():
        memory[name] = {
            "weights": weight_bytes(encoder),
            "activations": None
            if isinstance(encoder, OnnxEncoder)
            else measure_peak_bytes(lambda e=encoder: e.encode(batch)),
        }
    return Speed(**measure_speed(model, baseline, texts), memory_bytes=memory)


def weight_bytes(encoder: AnyEncoder) -> int:
    """Bytes of an encoder's weights; for ONNX Runtime, which does not report them, of its files."""
    if isinstance(encoder, OnnxEncoder):
        return sum(file.stat().st_size for file in onnx_files(encoder.path))
    return sum(weight.numel() * weight.element_size() for weight in _weights(encoder))


def _weights(encoder: TextEncoder | SentenceTransformerEncoder) -> list[Tensor]:
    if isinstance(encoder, SentenceTransformerEncoder):
        return list(encoder.model.parameters())
    projection = [] if encoder.projection is None else [encoder.projection]
    return [*encoder.backbone.parameters(), *encoder.heads.parameters(), *projection]


def size_on_disk(name: str | None) -> int | None:
    """Bytes of a folder's weight files or of an ONNX file; ``None`` for anything else."""
    folder = Path(name or "")
    if folder.suffix == ".onnx":
        return sum(file.stat().st_size for file in onnx_files(folder))
    if name is None or not (folder / "config.json").is_file():
        return None
    files = {file for pattern in WEIGHT_FILES for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)


def describe_task(
    task: Task,
    mode: str,
    scores: Mapping[str, Scores],
    also: Mapping[str, Scores],
    drawn: np.ndarray,
    seed: int,
) -> list[Entry]:
    """One entry for each metric of a task in a mode.

    ``retention`` is value / baseline; ``retention_above_floor`` is (value - floor) / (baseline -
    floor) with the larger floor. Both are ``None`` where the divisor is not above 0. The main
    metric has a 95 % ``interval`` over queries or pairs and the ``p_value`` of a paired test.

    Args:
        scores: Under ``model``, ``baseline`` (if there is one) and each of ``FLOORS``.
        also: Scores of further models, by name.
        drawn: The model's main score in every sample of a bootstrap.
    """
    key = (task.name, mode)
    ours = scores["model"][key]
    theirs = scores.get("baseline", {}).get(key)
    return [
        Entry(
            task=task.name,
            kind=task.kind,
            mode=mode,
            metric=metric,
            main=index == 0,
            value=value,
            **_compare(metric, key, scores, also),
            samples=len(ours.samples),
            texts=ours.texts,
            truncated=ours.truncated,
            seconds=ours.seconds,
            **({"interval": list(statistics.interval_of(drawn))} if index == 0 else {}),
            **(_compare_samples(task, ours, theirs, seed) if index == 0 and theirs else {}),
        )
        for index, (metric, value) in enumerate(ours.values.items())
    ]


def _compare(
    metric: str, key: tuple[str, str], scores: Mapping[str, Scores], also: Mapping[str, Scores]
) -> dict[str, Any]:
    """Baseline, floors and further models of one value, and the shares of them it reaches."""
    value = scores["model"][key].values[metric]
    theirs = scores.get("baseline", {}).get(key)
    baseline = None if theirs is None else theirs.values[metric]
    floors = {name: scores[name][key].values[metric] for name in FLOORS}
    floor = max(floors.values())
    above = baseline is not None and baseline > floor
    found = {
        "baseline": baseline,
        "floor": floor,
        "floors": floors,
        "retention": value / baseline if baseline is not None and baseline > 0 else None,
        "retention_above_floor": (value - floor) / (baseline - floor) if above else None,
    }
    if also:
        found["also"] = {
            name: s[key].values[metric] if key in s else None for name, s in also.items()
        }
    return found


def _compare_samples(task: Task, ours: Score, theirs: Score, seed: int) -> dict[str, float]:
    both = ours.samples, theirs.samples
    if task.kind == RETRIEVAL:
        return {"p_value": statistics.paired_p_value(*both, seed)}
    gold = np.array(task.pairs()[2])
    return {"p_value": statistics.paired_correlation_p_value(*both, gold, seed)}


def draw_scores(task: Task, score: Score, seed: int) -> np.ndarray:
    """The main score in every sample of a bootstrap over queries or pairs, ``(SAMPLES,)``."""
    if task.kind == RETRIEVAL:
        return statistics.bootstrap_means(score.samples, seed)
    gold = np.array(task.pairs()[2])
    return statistics.bootstrap_correlations(score.samples, gold, seed)


def write_evaluation(result: EvaluationRecord, path: Path, *, overwrite: bool = False) -> None:
    """Write a result as JSON, and its scores as a Markdown table beside it.

    Raises:
        FileExistsError: If one of them exists and ``overwrite`` is false.
        ValueError: If ``path`` does not name a JSON file.
    """
    path, table = evaluation_files(path)
    refuse_existing([path, table], overwrite=overwrite)
    write_json(result.as_dict(), path, overwrite=overwrite)
    write_text(table, "\n\n".join(render_scores(result)) + "\n")


def evaluate(
    model: str,
    baseline: str | None,
    tasks: Sequence[Task],
    modes: Sequence[str] = ("dense",),
    *,
    also: Mapping[str, str] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | None = None,
    prompts: Mapping[str, str] | None = None,
    precision: str = "fp32",
    speed: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> EvaluationRecord:
    """Score a model, its baseline and the two floors, count parameters and measure speed.

    The floors are the model's shape with random weights, and the words alone, with the embeddings
    of the baseline (of the model where there is none).

    Args:
        model: Folder, checkpoint, run folder or hub name of the model to judge.
        baseline: The unpruned model; with ``None`` neither retention nor speed is computed.
        also: More models to score, under their names (the pruned model before recovery, for one).
        max_length: Tokens at which texts are cut; ``None`` keeps each model's own limit.
        prompts, precision: Of every model, see :func:`load_encoder`.
        seed: Seed of the random weights and of the intervals.

    Returns:
        What ``evaluation.json`` holds; for ``tasks`` see :func:`describe_task`, for ``means``
        :func:`bge_pruning.evaluation.task_means.describe_means`.

    Raises:
        ValueError: If there is no task, a mode is unknown or the model has no head for it, a number
            is out of range, the device cannot be used, or a model's score is undefined.
        FileNotFoundError: If a path to a model does not exist.
        OSError: If the hub cannot deliver a model.
    """
    if not tasks:
        raise ValueError("no task to evaluate on. To fix, give at least one.")
    _check_numbers(batch_size, max_length, seed)
    device = device or default_device()
    check_device(device)
    sizes = {"max_length": max_length, "batch_size": batch_size}
    load = partial(load_encoder, device=device, prompts=prompts, precision=precision, **sizes)
    others = also or {}
    fetch_models([model, *([baseline] if baseline else []), *others.values()])
    log.info("loading %s", model)
    judged = load(model)
    check_modes(modes, judged.names(), model)
    reference = load(baseline) if baseline else None
    for folder in others.values():
        load(folder)  # what cannot be loaded is refused before anything is scored
    score = partial(_score, tasks=tasks, modes=modes, progress=progress)
    scores = _score_all(judged, reference, seed, score)
    gc.collect()  # models sit in reference cycles, and the next may not fit beside the last
    extra = {}
    for name, folder in others.items():
        extra[name] = score(name, partial(load, folder))
        gc.collect()
    entries, means = _describe(tasks, modes, scores, extra, seed)
    return EvaluationRecord(
        model=model,
        baseline=baseline,
        tasks=entries,
        means=means,
        parameters={
            "model": count_parameters(judged),
            "baseline": None if reference is None else count_parameters(reference),
        },
        size_bytes={"model": size_on_disk(model), "baseline": size_on_disk(baseline)},
        speed=_measure_speed(judged, reference, tasks) if reference and speed else None,
        seed=seed,
        max_length=max_length,
        precision=precision,
        versions=collect_versions(),
    )


def _score(
    what: str,
    load: Callable[[], AnyEncoder | WordEmbeddings],
    tasks: Sequence[Task],
    modes: Sequence[str],
    progress: bool,
) -> Scores:
    encoder = load()
    scores: Scores = {}
    for number, task in enumerate(tasks, 1):
        log.info("evaluating %s on %s (task %d of %d)", what, task.name, number, len(tasks))
        scores |= score_tasks(encoder, [task], modes, progress)
    return scores


def _score_all(
    judged: AnyEncoder,
    reference: AnyEncoder | None,
    seed: int,
    score: Callable[[str, Callable[[], AnyEncoder | WordEmbeddings]], Scores],
) -> dict[str, Scores]:
    """Scores of the model, its baseline and the two floors."""
    return {
        "model": score("the model", lambda: judged),
        **({} if reference is None else {"baseline": score("the baseline", lambda: reference)}),
        "word_embeddings": score("the words alone", lambda: WordEmbeddings(reference or judged)),
        "random_weights": score("random weights", lambda: untrained_encoder(judged, seed)),
    }


def _describe(
    tasks: Sequence[Task],
    modes: Sequence[str],
    scores: Mapping[str, Scores],
    also: Mapping[str, Scores],
    seed: int,
) -> tuple[list[Entry], list[Entry]]:
    """Entries of the tasks, and of the means over tasks of a kind."""
    log.info("computing intervals and paired tests")
    cells = [(task, mode) for task in tasks for mode in modes]
    drawn = {(t.name, m): draw_scores(t, scores["model"][t.name, m], seed) for t, m in cells}
    entries = [describe_task(t, m, scores, also, drawn[t.name, m], seed) for t, m in cells]
    means = describe_means([part[0] for part in entries], drawn)
    return [entry for part in entries for entry in part], means


def _check_numbers(batch_size: int, max_length: int | None, seed: int) -> None:
    for key, value in {"batch_size": batch_size, "max_length": max_length}.items():
        if value is not None and value < 1:
            raise ValueError(f"{key} {value} is not above 0. To fix, use 1 or more.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not in [0, 2^64). To fix, use 0.")


def _measure_speed(judged: AnyEncoder, reference: AnyEncoder, tasks: Sequence[Task]) -> Speed:
    """Measure on sentences if there are any, else on queries, with the model's prompts."""
    log.info("measuring speed and memory, the model and the baseline in turns")
    kinds = {task.kind for task in tasks}
    kind, role = (SIMILARITY, "text") if SIMILARITY in kinds else (RETRIEVAL, "query")
    texts: dict[str, None] = {}
    for task in (task for task in tasks if task.kind == kind):
        prompt = task_prompt(judged, role, task.mteb_task.metadata)
        parts = task.pairs()[:2] if kind == SIMILARITY else [task.queries()]
        texts |= dict.fromkeys(prompt + text for part in parts for text in part)
    return measure_cost(judged, reference, list(texts))
