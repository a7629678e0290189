"""Judges a model beside the unpruned one and two floors, on any tasks, in any mode."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bge_pruning.evaluation.cost import AnyEncoder, measure_cost, size_on_disk
from bge_pruning.evaluation.encoders import (
    count_parameters,
    fetch_models,
    load_encoder,
    untrained_encoder,
)
from bge_pruning.evaluation.entries import describe_task
from bge_pruning.evaluation.floors import WordEmbeddings
from bge_pruning.evaluation.scoring import Scores, score_tasks
from bge_pruning.evaluation.search import check_modes
from bge_pruning.evaluation.tasks import SIMILARITY, Task
from bge_pruning.reports.score_table import render_scores
from bge_pruning.utils.devices import check_device, default_device
from bge_pruning.utils.evaluation import (
    collect_versions,
    evaluation_files,
    refuse_existing,
    write_json,
    write_text,
)

log = logging.getLogger(__name__)


def write_evaluation(result: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write a result as JSON, and its scores as a Markdown table beside it.

    Args:
        result: What :func:`evaluate` returns.
        path: JSON file.
        overwrite: Whether existing files may be replaced.

    Raises:
        FileExistsError: If one of them exists and ``overwrite`` is false.
        ValueError: If ``path`` is no name for a JSON file.
    """
    path, table = evaluation_files(path)
    refuse_existing([path, table], overwrite=overwrite)
    write_json(result, path, overwrite=overwrite)
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
    speed: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Scores a model, its baseline and the two floors, counts parameters and measures speed.

    The floors are the model's shape with random weights, and, for dense vectors, the mean of the
    word embeddings of the baseline (of the model where there is none).

    Args:
        model: Folder, checkpoint, run folder or hub name of the model to judge.
        baseline: The unpruned model, or ``None``; then there is no retention and no speed.
        tasks: See :mod:`bge_pruning.evaluation.tasks`; each is evaluated in every mode.
        modes: See :data:`bge_pruning.evaluation.search.MODES`.
        also: More models to score, under their names (the pruned model before recovery, for one).
        batch_size: Texts in a batch.
        max_length: Tokens at which texts are cut, for every model; ``None`` keeps each model's own
            limit.
        device: Torch device; ``None`` for the best there is.
        speed: Whether to measure speed and memory.
        seed: Seed of the random weights and of the intervals.
        progress: Show progress bars.

    Returns:
        JSON-ready ``model``, ``baseline``, ``tasks`` (see :func:`describe_task`), ``parameters``,
        ``size_bytes``, ``speed``, ``seed``, ``max_length`` and ``versions``.

    Raises:
        ValueError: If there is no task, a mode is unknown or the model has no head for it, a number
            is out of range, the device cannot be used, or a model's score is undefined.
        FileNotFoundError: If a model named by a path is not there.
        OSError: If the hub cannot deliver a model.
    """
    if not tasks:
        raise ValueError("no task to evaluate on. To fix, give at least one.")
    _check_numbers(batch_size, max_length, seed)
    load = _loader(device or default_device(), max_length, batch_size)
    others = also or {}
    fetch_models([model, *([baseline] if baseline else []), *others.values()])
    judged = load(model)
    check_modes(modes, judged.names(), model)
    reference = load(baseline) if baseline else None
    score = partial(_score, tasks=tasks, modes=modes, progress=progress)
    scores = _score_all(judged, reference, seed, score)
    extra = {name: score(name, partial(load, folder)) for name, folder in others.items()}
    entries = [describe_task(t, mode, scores, extra, seed) for t in tasks for mode in modes]
    return {
        "model": model,
        "baseline": baseline,
        "tasks": [entry for part in entries for entry in part],
        **_describe_models(judged, reference, {"model": model, "baseline": baseline}),
        "speed": _measure_speed(judged, reference, tasks) if reference and speed else None,
        "seed": seed,
        "max_length": max_length,
        "versions": collect_versions(),
    }


def _loader(device: str, max_length: int | None, batch_size: int) -> Callable[[str], AnyEncoder]:
    """Loads a model by its name, onto a device that is there."""
    check_device(device)
    return partial(load_encoder, device=device, max_length=max_length, batch_size=batch_size)


def _score(
    what: str,
    load: Callable[[], AnyEncoder | WordEmbeddings],
    tasks: Sequence[Task],
    modes: Sequence[str],
    progress: bool,
) -> Scores:
    log.info("evaluating %s on %s", what, ", ".join(task.name for task in tasks))
    scores = score_tasks(load(), tasks, modes, progress)
    gc.collect()  # a model sits in reference cycles, and the next may not fit beside it
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
        "word_embeddings": score("word embeddings", lambda: WordEmbeddings(reference or judged)),
        "random_weights": score("random weights", lambda: untrained_encoder(judged, seed)),
    }


def _check_numbers(batch_size: int, max_length: int | None, seed: int) -> None:
    for key, value in {"batch_size": batch_size, "max_length": max_length}.items():
        if value is not None and value < 1:
            raise ValueError(f"{key} {value} is not above 0. To fix, use 1 or more.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not in [0, 2^64). To fix, use 0.")


def _describe_models(
    judged: AnyEncoder, reference: AnyEncoder | None, names: Mapping[str, str | None]
) -> dict[str, Any]:
    return {
        "parameters": {
            "model": count_parameters(judged),
            "baseline": None if reference is None else count_parameters(reference),
        },
        "size_bytes": {which: size_on_disk(name) for which, name in names.items()},
    }


def _measure_speed(
    judged: AnyEncoder, reference: AnyEncoder, tasks: Sequence[Task]
) -> dict[str, Any]:
    """On sentences if there are any, else on queries."""
    pairs = [task.pairs() for task in tasks if task.kind == SIMILARITY]
    texts = [text for first, second, _ in pairs for text in (*first, *second)]
    for task in tasks if not texts else ():
        texts += task.queries()
    return measure_cost(judged, reference, list(dict.fromkeys(texts)))
