"""Judges a pruned model by textual similarity, beside the unpruned model and two floors."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.models.quiet import no_loading_bars
from bge_pruning.utils.embedding_metrics import compute_cosine_spearman
from bge_pruning.utils.floors import build_random_weights_model, build_word_embedding_model
from bge_pruning.utils.model_analysis import count_by_part, count_parameters, measure_speed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# First sentences, second sentences, gold scores: one entry for each pair.
Pairs = tuple[list[str], list[str], list[float]]
LIBRARIES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
)


@dataclass(frozen=True)
class Score:
    """Score of one model on one task, and the seconds it took."""

    value: float
    seconds: float


def evaluate(
    model: str,
    baseline: str | None,
    sts: Mapping[str, Pairs],
    *,
    also: Mapping[str, str] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    device: str | None = None,
    speed: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores a model, its baseline and the two floors, counts parameters and measures speed.

    The floors are the model's shape with random weights, and the mean of the word embeddings of the
    baseline (of the model where there is none). ``retention`` is value / baseline;
    ``retention_above_floor`` is (value - floor) / (baseline - floor) with the larger floor, and
    ``None`` where the baseline does not clear it.

    Args:
        model: Folder or hub name of the model to judge, in the sentence-transformers layout.
        baseline: The unpruned model, or ``None``; then there is no retention and no speed.
        sts: Pairs under the name of each task.
        also: More models to score, under their names (the pruned model before recovery, for one).
        batch_size: Texts in a batch.
        max_length: Tokens at which texts are cut, for every model; ``None`` keeps each model's own
            limit.
        device: Torch device; ``None`` lets sentence-transformers choose.
        speed: Whether to measure speed.
        seed: Seed of the random weights.

    Returns:
        JSON-ready ``model``, ``baseline``, ``tasks``, ``parameters``, ``speed``, ``versions``.

    Raises:
        ValueError: If there is no task, its columns differ in length, or a model's score is
            undefined.
        FileNotFoundError: If a model named by a path is no folder.
    """
    _check_tasks(sts)
    for name in (model, *([baseline] if baseline else []), *(also or {}).values()):
        check_name(name)  # all of them, before the first is scored
    options = {"max_length": max_length, "device": device}
    judged = load_encoder(model, **options)
    reference = load_encoder(baseline, **options) if baseline else None
    scores = {"model": score_sts(judged, sts, batch_size)}
    if reference is not None:
        scores["baseline"] = score_sts(reference, sts, batch_size)
    scores |= _score_floors(model, reference or judged, sts, batch_size, options, seed)
    extra = {
        name: _score_and_free(folder, sts, batch_size, options)
        for name, folder in (also or {}).items()
    }
    counts = {
        "model": _count(model, judged),
        "baseline": _count(baseline, reference) if baseline else None,
    }
    measured = speed and reference is not None
    return {
        "model": model,
        "baseline": baseline,
        "tasks": [_describe_task(task, scores, extra, len(sts[task][2])) for task in sts],
        "parameters": counts,
        "speed": measure_speed(judged, reference, unique_sentences(sts)) if measured else None,
        "seed": seed,
        "versions": collect_versions(),
    }


def _score_floors(
    model: str,
    trained: SentenceTransformer,
    sts: Mapping[str, Pairs],
    batch_size: int,
    options: dict[str, Any],
    seed: int,
) -> dict[str, dict[str, Score]]:
    """Scores of the two floors; what they need of memory is free again afterwards."""
    words = score_sts(build_word_embedding_model(trained), sts, batch_size)
    untrained = _score_untrained(model, sts, batch_size, options, seed)
    return {"word_embeddings": words, "random_weights": untrained}


def load_encoder(
    name: str, *, max_length: int | None = None, device: str | None = None
) -> SentenceTransformer:
    """Loads a sentence-transformers model, offline where it is a folder.

    Args:
        name: Folder or hub name.
        max_length: Tokens at which texts are cut, at most the model's own limit; ``None`` keeps
            that limit.
        device: Torch device; ``None`` lets sentence-transformers choose.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the name is a path (not ``owner/name``) and no such folder exists.
        ValueError: If the folder has no ``modules.json``, or ``max_length`` is not positive.
    """
    check_name(name)
    from sentence_transformers import SentenceTransformer

    try:
        with no_loading_bars():
            model = SentenceTransformer(name, device=device).eval()
    except Exception as error:  # each of the libraries below has its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{name} cannot be loaded on {device or 'the default device'} ({reason}). To fix, "
            f"check the name and the device, and that its files are complete."
        ) from error
    return _limit(model, max_length)


def check_name(name: str) -> None:
    """Refuse a model's name that cannot be loaded, in no time.

    Raises:
        FileNotFoundError: If the name is a path (not ``owner/name``) and no such folder exists.
        ValueError: If the folder has no ``modules.json``.
    """
    folder = Path(name)
    is_path = folder.is_absolute() or name.startswith(".") or len(folder.parts) != 2
    if is_path and not folder.is_dir():
        raise FileNotFoundError(
            f"model {name} is no folder. To fix, give a model's folder or owner/name on the hub."
        )
    if folder.is_dir() and not (folder / "modules.json").is_file():
        # sentence-transformers would silently fall back to mean pooling.
        raise ValueError(
            f"{name} has no modules.json, so its pooling is unknown. To fix, extract or export it "
            "again."
        )


def _limit(model: SentenceTransformer, max_length: int | None) -> SentenceTransformer:
    """The model, cutting texts at ``max_length`` tokens."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length {max_length} leaves no token. To fix, use 1 or more.")
    if max_length is not None:
        model.max_seq_length = min(max_length, model.max_seq_length or max_length)
    return model


def score_sts(
    model: SentenceTransformer, sts: Mapping[str, Pairs], batch_size: int
) -> dict[str, Score]:
    """Cosine Spearman of each task; a sentence that occurs in several pairs is encoded once.

    Args:
        model: The model to score.
        sts: Pairs under the name of each task.
        batch_size: Texts in a batch; sentence-transformers sorts them by length.

    Returns:
        The score of each task.

    Raises:
        ValueError: If a task's correlation is undefined; the message names the task.
    """
    results = {}
    for task, (first, second, gold) in sts.items():
        start = time.perf_counter()
        texts = unique_sentences({task: sts[task]})
        row = {text: index for index, text in enumerate(texts)}
        vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        a, b = (vectors[[row[text] for text in column]] for column in (first, second))
        try:
            value = compute_cosine_spearman(a, b, gold)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
        results[task] = Score(value, time.perf_counter() - start)
    return results


def unique_sentences(sts: Mapping[str, Pairs]) -> list[str]:
    """Every sentence of every task once, in order of first appearance."""
    return list(
        dict.fromkeys(text for first, second, _ in sts.values() for text in (*first, *second))
    )


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a score depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def write_json(result: Mapping[str, Any], path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a result atomically: readers see the old file or the new one, never half of it.

    Args:
        result: JSON-ready; NaN is refused, as it is no JSON.
        path: File to write; its folder is made.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is false.
    """
    refuse_existing([path], overwrite=overwrite)
    write_text(path, json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(paths: Iterable[str | Path], *, overwrite: bool) -> None:
    """Stops before the long work whose result could not be written.

    Args:
        paths: Files that are to be written.
        overwrite: Whether existing files may be replaced.

    Raises:
        FileExistsError: If a file exists and ``overwrite`` is false.
    """
    for path in paths:
        if Path(path).exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists. To fix, choose another name or pass --overwrite."
            )


def _check_tasks(sts: Mapping[str, Pairs]) -> None:
    if not sts:
        raise ValueError("no task to evaluate on. To fix, give at least one STS file.")
    for task, columns in sts.items():
        if len({len(column) for column in columns}) != 1:
            lengths = [len(column) for column in columns]
            raise ValueError(
                f"{task}: columns of {lengths} entries. To fix, give two sentences and a score "
                "per pair."
            )


def _score_and_free(
    folder: str, sts: Mapping[str, Pairs], batch_size: int, options: dict[str, Any]
) -> dict[str, Score]:
    """Scores a model that is not needed afterwards."""
    scores = score_sts(load_encoder(folder, **options), sts, batch_size)
    gc.collect()  # the model sits in reference cycles, and the next may not fit beside it
    return scores


def _score_untrained(
    model: str, sts: Mapping[str, Pairs], batch_size: int, options: dict[str, Any], seed: int
) -> dict[str, Score]:
    """Scores the model's shape with random weights."""
    untrained = build_random_weights_model(model, device=options["device"], seed=seed)
    return score_sts(_limit(untrained, options["max_length"]), sts, batch_size)


def _describe_task(
    task: str,
    scores: Mapping[str, dict[str, Score]],
    extra: Mapping[str, dict[str, Score]],
    pairs: int,
) -> dict[str, Any]:
    """One entry of ``tasks``."""
    value = scores["model"][task].value
    baseline = scores["baseline"][task].value if "baseline" in scores else None
    floors = {name: scores[name][task].value for name in ("random_weights", "word_embeddings")}
    floor = max(floors.values())
    entry = {
        "task": task,
        "mode": "dense",
        "metric": "cosine_spearman",
        "value": value,
        "baseline": baseline,
        "floor": floor,
        "floors": floors,
        "retention": value / baseline if baseline is not None and baseline > 0 else None,
        "retention_above_floor": (
            (value - floor) / (baseline - floor)
            if baseline is not None and baseline > floor
            else None
        ),
        "pairs": pairs,
        "seconds": scores["model"][task].seconds,
    }
    if extra:
        entry["also"] = {name: results[task].value for name, results in extra.items()}
    return entry


def _count(name: str, model: SentenceTransformer) -> dict[str, int]:
    """Parameters by part; of a model from the hub only the encoder is known, so heads are 0."""
    if Path(name).is_dir():
        return count_parameters(name)
    return count_by_part(
        {key: value.numel() for key, value in model.transformers_model.named_parameters()}
    )
