"""A study of quality: a grid of pipeline runs, each written as one file when it is done.

Launch:
    python scripts/run_quality_study.py STUDY.yaml
"""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.config import Config, ConfigError, pruned_model_folder
from bge_pruning.config_schema import L0
from bge_pruning.pipeline import check_modes, keeps_best, prune
from bge_pruning.study_cells import cell_file, describe_config, hash_config, unfinished
from bge_pruning.study_file import Cell, Study, cell_config, select_cells
from bge_pruning.utils.evaluation import (
    collect_versions,
    describe_machine,
    refuse_unwritable_folders,
    write_json,
)
from bge_pruning.utils.study_records import REFERENCE, read_reference

if TYPE_CHECKING:
    from bge_pruning.evaluation.encoders import Encoder
    from bge_pruning.evaluation.tasks import Task

log = logging.getLogger(__name__)

Entry = dict[str, Any]


def run_study(study: Study, only: Sequence[str] = (), overwrite: bool = False) -> list[Path]:
    """Run the cells that are not finished yet, in order.

    A study that was stopped goes on when it is run again: finished cells are kept, and the one it
    was stopped in goes on from its last checkpoint.

    Args:
        study: The study.
        only: Conditions on the cells, see :func:`bge_pruning.study_file.select_cells`.
        overwrite: Run cells again that were finished with another configuration.

    Returns:
        Files of the cells that were asked for.

    Raises:
        ConfigError: If a configuration is wrong, or finished cells are of another one.
        FileNotFoundError: If a model or data is not there.
        ValueError: If data is wrong, or the results folder holds another study.
    """
    cells = select_cells(study, only)
    todo = unfinished(study, cells, overwrite)
    log.info("%d of %d cells are to be run", len(todo), len(cells))
    if todo:
        _check(study, todo)
        tasks = find_study_tasks(study)
        reference = _find_reference(study, cell_config(study, todo[0], "prune"), tasks)
    for number, cell in enumerate(todo, 1):
        log.info("cell %d of %d: %s", number, len(todo), cell.name)
        result = run_cell(study, cell, tasks, reference)
        write_json(result, cell_file(study, cell), overwrite=True)
        _remove_runs(study, cell)
        gc.collect()  # a trainer sits in reference cycles
    return [cell_file(study, cell) for cell in cells]


def _check(study: Study, cells: Sequence[Cell]) -> None:
    """Refuse now what one of the cells would refuse hours later."""
    from bge_pruning.baselines import check_baseline
    from bge_pruning.data_builders import check_objective
    from bge_pruning.train import check_run

    refuse_unwritable_folders({"results_folder": study.results, "run_folder": study.runs})
    originals = {}
    for cell in {(cell.method, cell.size): cell for cell in reversed(cells)}.values():
        config = cell_config(study, cell, "prune")
        if config.model.l0_module is None:
            raise ConfigError(
                f"{cell.name}: model.l0_module is null: there is nothing to prune. To fix, give "
                f"the sizes of the study a target."
            )
        check_objective(cell_config(study, cell, "recover"))
        check_run(config) if config.method == L0 else check_baseline(config)
        check_modes(config, study.modes)
        originals[config.model.base_model] = cell.name
    if len(originals) > 1:
        raise ConfigError(
            f"the cells prune different models: {', '.join(originals)}. To fix, make a study for "
            f"each of them."
        )


def find_study_tasks(study: Study) -> list[Task]:
    """What the models of a study are judged by, loaded.

    Raises:
        ConfigError: If two tasks have one name.
        FileNotFoundError: See :func:`bge_pruning.evaluation.tasks.find_tasks`, also for what else.
    """
    from bge_pruning.evaluation.tasks import find_tasks

    tasks = find_tasks(study.sts, []) if study.sts else []
    for name, split in study.retrieval.items():
        tasks += find_tasks([], [name], split)
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two tasks are called {repeated[0]}. To fix, rename a file or folder: the name is the "
            f"task's."
        )
    return tasks


def _find_reference(study: Study, config: Config, tasks: Sequence[Task]) -> dict[str, Any]:
    """Scores of the original and of the floors, measured once for all cells."""
    path = study.results / REFERENCE
    original = study.original or config.model.base_model
    judged_by = {
        "tasks": {task.name: task.split for task in tasks},
        "modes": list(study.modes),
        "max_length": study.max_length,
    }
    if path.is_file():
        found = read_reference(study.results)
        if (found["original"], found["judged_by"]) != (original, judged_by):
            raise ConfigError(
                f"{path} is of another original or other tasks and is kept, and so are the cells "
                f"beside it. To fix, set another results_folder in the study."
            )
        return found
    reference = measure_reference(study, config, original, tasks)
    write_json({"original": original, "judged_by": judged_by, **reference}, path)
    return reference


def measure_reference(
    study: Study, config: Config, original: str, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Score the original, the mean of its word embeddings and its shape with random weights.

    Args:
        study: The study.
        config: Of a cell.
        original: Folder or name.
        tasks: What to score them on.
    """
    from bge_pruning.evaluation.encoders import count_parameters, load_encoder, untrained_encoder
    from bge_pruning.evaluation.floors import WordEmbeddings

    log.info("scoring the original and the floors")
    encoder = load_encoder(original, _device(config), study.max_length)
    models: dict[str, Callable[[], Encoder]] = {
        "original": lambda: encoder,
        "word_embeddings": lambda: WordEmbeddings(encoder),
        "random_weights": lambda: untrained_encoder(encoder, seed=0),
    }
    return {
        "parameters": count_parameters(encoder),
        "scores": {name: score_model(load(), tasks, study.modes) for name, load in models.items()},
        "versions": collect_versions(),
    }


def score_model(encoder: Encoder, tasks: Sequence[Task], modes: Sequence[str]) -> list[Entry]:
    """Main score of a model in every task and mode.

    Args:
        encoder: The model.
        tasks: What to score it on.
        modes: See :data:`bge_pruning.evaluation.search.MODES`.
    """
    from bge_pruning.evaluation.scoring import score_tasks

    kinds = {task.name: task.kind for task in tasks}
    entries = []
    for (task, mode), score in score_tasks(encoder, tasks, modes).items():
        metric, value = next(iter(score.values.items()))
        entries.append(
            {"task": task, "kind": kinds[task], "mode": mode, "metric": metric, "value": value}
        )
    return entries


def run_cell(
    study: Study, cell: Cell, tasks: Sequence[Task], reference: Mapping[str, Any]
) -> dict[str, Any]:
    """Prune or choose, recover, extract and judge; what an earlier call has done is kept.

    Args:
        study: The study.
        cell: The cell.
        tasks: What to judge by.
        reference: See :func:`measure_reference`.

    Returns:
        Content of the cell's file, see :data:`bge_pruning.utils.study_records.CELL`.
    """
    config = cell_config(study, cell, "prune")
    recovery = cell_config(study, cell, "recover")
    chosen = _make_models(config, recovery)
    started = time.monotonic()
    model, pruned = Path(config.results_folder) / "model", pruned_model_folder(config)
    scores = _score_folder(model, config, study, tasks, study.modes)
    cut = _cut_loss(config, pruned, study, tasks, reference)
    evaluated = time.monotonic() - started
    described = describe_config(study, cell)
    return {
        "method": cell.method,
        "size": cell.size,
        "seed": cell.seed,
        "config_hash": hash_config(described),
        **_describe_model(model),
        **_describe_training(config, recovery, chosen, evaluated),
        "scores": _with_retention(scores, reference["scores"]["original"]),
        "gates": _describe_gates(config, pruned),
        "cut": cut,
        "versions": collect_versions(),
        "machine": describe_machine(_device(config)),
        "config": described,
    }


def _make_models(config: Config, recovery: Config) -> float | None:
    """Train and write the pruned and the recovered model, as far as they are not there.

    Returns:
        Seconds of a baseline's choice and cut; ``None`` if an earlier call has made it.
    """
    from bge_pruning.export.extract import extract
    from bge_pruning.models.pruning_record import MARKER
    from bge_pruning.train import train

    seconds = None
    if not (pruned_model_folder(config) / MARKER).is_file():
        started = time.monotonic()
        prune(config)
        seconds = time.monotonic() - started
    model = Path(config.results_folder) / "model"
    if not (model / MARKER).is_file():
        extract(train(recovery), model, best=keeps_best(recovery))
    return seconds


def _device(config: Config) -> str:
    from bge_pruning.utils.devices import default_device

    return {"gpu": "cuda"}.get(config.device, config.device) or default_device()


def _score_folder(
    folder: Path, config: Config, study: Study, tasks: Sequence[Task], modes: Sequence[str]
) -> list[Entry]:
    from bge_pruning.evaluation.encoders import load_encoder

    return score_model(load_encoder(str(folder), _device(config), study.max_length), tasks, modes)


def _with_retention(scores: list[Entry], originals: Sequence[Entry]) -> list[Entry]:
    by_key = {(entry["task"], entry["mode"]): entry["value"] for entry in originals}
    for entry in scores:
        original = by_key[entry["task"], entry["mode"]]
        entry["retention"] = entry["value"] / original if original > 0 else None
    return scores


def _describe_model(model: Path) -> dict[str, Any]:
    from bge_pruning.models.pruning_record import MARKER
    from bge_pruning.utils.record_schemas import PRUNING
    from bge_pruning.utils.records import read_record

    info = read_record(model / MARKER, PRUNING, "run the cell again")
    counts = info["parameters"]
    return {
        "encoder_share": counts["extracted"]["encoder"] / counts["source"]["encoder"],
        "parameters": counts["extracted"],
        "kept_layers": info["kept"]["layer"],
    }


def _describe_training(
    config: Config, recovery: Config, chosen: float | None, evaluated: float
) -> dict[str, Any]:
    """Steps, tokens and seconds by stage; those of interrupted trainings are whole."""
    from bge_pruning.models.checkpoint import find_checkpoint, read_progress

    runs = {"recover": recovery.run_folder}
    if config.method == L0:
        runs = {"prune": config.run_folder, **runs}
    progress = {
        stage: read_progress(find_checkpoint(Path(folder))) for stage, folder in runs.items()
    }
    seconds = {} if config.method == L0 else {"choose": chosen}
    return {
        "steps": {stage: found.batches for stage, found in progress.items()},
        "tokens": {stage: found.tokens for stage, found in progress.items()},
        "seconds": {
            **seconds,
            **{stage: found.seconds for stage, found in progress.items()},
            "evaluate": evaluated,
        },
    }


def _describe_gates(config: Config, pruned: Path) -> dict[str, Any] | None:
    """How decided the gates were before the cut, and how far from the target; of l0 alone.

    Returns:
        ``distance``, the mean over the gates of an axis of the distance of a gate's open
        probability to 0 or 1, and ``gap``, expected minus target sparsity, both by axis; under
        ``all`` the distance over all gates, under ``encoder`` the gap of the encoder's parameters.
    """
    from bge_pruning.models.checkpoint import load_trained_model
    from bge_pruning.models.l0_module_embedding import distances_to_binary
    from bge_pruning.models.pruning_record import compute_constraint_report

    if config.method != L0:
        return None
    gates = load_trained_model(_cut_checkpoint(pruned)).l0_module
    constraint = compute_constraint_report(gates, gates.realised_shape())
    return {
        "distance": distances_to_binary(gates.open_probabilities()),
        "gap": {
            axis: row["expected_sparsity"] - row["target_sparsity"]
            for axis, row in constraint.items()
        },
    }


def _cut_checkpoint(pruned: Path) -> Path:
    """The checkpoint that a pruned model was cut from: perhaps the best, not the newest."""
    from bge_pruning.models.pruning_record import MARKER
    from bge_pruning.utils.records import TEXT, read_record

    record = read_record(pruned / MARKER, {"checkpoint": TEXT}, "run the cell again")
    return Path(record["checkpoint"])


def _cut_loss(
    config: Config, pruned: Path, study: Study, tasks: Sequence[Task], reference: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """What the cut itself costs, before any recovery, in Spearman of dense vectors by task.

    Before it a model of gates is scored with every gate at the median of its noise, and for a
    baseline the unpruned model.
    """
    from bge_pruning.evaluation.tasks import SIMILARITY

    pairs = [task for task in tasks if task.kind == SIMILARITY]
    if not pairs:
        return {}
    if config.method == L0:
        before = score_model(_gated_encoder(config, pruned, study), pairs, ["dense"])
    else:
        before = [e for e in reference["scores"]["original"] if e["mode"] == "dense"]
    values = {entry["task"]: entry["value"] for entry in before}
    after = _score_folder(pruned, config, study, pairs, ["dense"])
    return {
        entry["task"]: {
            "before": values[entry["task"]],
            "after": entry["value"],
            "lost": values[entry["task"]] - entry["value"],
        }
        for entry in after
        if entry["task"] in values
    }


def _gated_encoder(config: Config, pruned: Path, study: Study) -> Encoder:
    """The model of a pruning run as it is before the cut."""
    from bge_pruning.evaluation.text_encoder import TextEncoder
    from bge_pruning.models.checkpoint import load_trained_model
    from bge_pruning.models.extraction import as_base_model
    from bge_pruning.models.structural_pruning import PruningMasks

    model = load_trained_model(_cut_checkpoint(pruned))
    device = _device(config)
    gates = vars(model.l0_module.median_masks())
    masks = PruningMasks(**{k: None if z is None else z.to(device) for k, z in gates.items()})
    base = as_base_model(model, "the model before the cut")
    return TextEncoder(base, device, study.max_length, 32, masks)


def _remove_runs(study: Study, cell: Cell) -> None:
    """Free the disk of what a finished cell needs no more."""
    for name in (cell.name, f"{cell.name}-recovery", f"{cell.name}-results"):
        if (study.runs / name).exists():
            shutil.rmtree(study.runs / name)
