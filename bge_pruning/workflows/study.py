"""A study of quality: a grid of pipeline runs, each written as one file when it is done."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bge_pruning.config.command_checks import check_cells
from bge_pruning.config.load import Config, ConfigError, pruned_model_folder
from bge_pruning.config.names import data_path
from bge_pruning.config.schema import L0
from bge_pruning.evaluation.encoders import count_parameters, load_encoder, untrained_encoder
from bge_pruning.evaluation.floors import WordEmbeddings
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.tasks import SIMILARITY, Task, check_names, find_tasks
from bge_pruning.evaluation.text_encoder import Encoder, TextEncoder
from bge_pruning.export.pruning_record import MARKER, compute_constraint_report
from bge_pruning.model_io import checkpoint
from bge_pruning.models.l0_module_embedding import distances_to_binary
from bge_pruning.models.structural_pruning import PruningMasks
from bge_pruning.reports.study_records import (
    REFERENCE,
    Cut,
    GateState,
    ReferenceScores,
    StudyCell,
    StudyReference,
    StudyScore,
    read_reference,
)
from bge_pruning.utils.environment import collect_versions, describe_machine, torch_device
from bge_pruning.utils.files import lock_of, refuse_unwritable_folders, write_json
from bge_pruning.utils.json_records import read_record
from bge_pruning.utils.records import Parameters, PruningRecord
from bge_pruning.utils.run_log import stoppable
from bge_pruning.workflows.stages import check_road, check_tasks, prune, recover
from bge_pruning.workflows.study_file import (
    Cell,
    Study,
    cell_config,
    cell_file,
    describe_config,
    find_differences,
    hash_config,
    select_cells,
    unfinished,
)

log = logging.getLogger(__name__)


def run_study(study: Study, only: Sequence[str] = (), overwrite: bool = False) -> list[Path]:
    """Run the cells that are not finished yet, in order.

    A study that was stopped resumes when it is run again: finished cells are kept, and the one that
    it was stopped in resumes from its last checkpoint. Several processes may run one study at once,
    on a file system with locks: each takes cells that no other works on. What a process leaves that
    dies is for the next call. Cells finished with another configuration run again with
    ``overwrite``.

    Returns:
        Files of the cells that were asked for, without those that another process still works on.

    Raises:
        ConfigError: If a configuration is invalid, or finished cells are of another one.
        FileNotFoundError: If a model or data does not exist.
        StoppedError: If a signal ends it.
        ValueError: If data are invalid, or the results folder holds another study.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "a study trains each cell in one process, and this is one of several ranks. To fix, "
            "start it without a launcher, several times to use several devices."
        )
    cells = select_cells(study, only)
    with stoppable("run the same command again"):
        _run_cells(study, cells, overwrite)
    return [path for cell in cells if (path := cell_file(study, cell)).is_file()]


def _run_cells(study: Study, cells: Sequence[Cell], overwrite: bool) -> None:
    todo = unfinished(study, cells, overwrite)
    log.info("%d of %d cells are to be run", len(todo), len(cells))
    for cell in set(cells) - set(todo):
        with lock_of(study.runs / cell.name, wait=False) as is_ours:
            if is_ours:
                _remove_runs(study, cell)  # it may have been stopped just before
    if todo or not (study.results / REFERENCE).is_file():
        configs = _check(study, todo)
        tasks = find_study_tasks(study)
        different = {repr((pair[0].data, pair[1].data)): pair for pair in configs}
        for pair in different.values():  # most cells have the same data
            check_tasks(*pair, tasks, study.max_length)
        reference = _find_reference(study, cell_config(study, cells[0], "prune"), tasks)
    for number, cell in enumerate(todo, 1):
        with lock_of(study.runs / cell.name, wait=False) as is_ours:
            if not is_ours or not unfinished(study, [cell], overwrite):
                state = "was done" if is_ours else "is being done"
                log.info("%s %s by another process", cell.name, state)
                continue
            log.info("cell %d of %d: %s", number, len(todo), cell.name)
            _start_runs(study, cell)
            result = run_cell(study, cell, tasks, reference)
            write_json(result.as_dict(), cell_file(study, cell), overwrite=True)
            _remove_runs(study, cell)
            gc.collect()  # a trainer sits in reference cycles


def _check(study: Study, cells: Sequence[Cell]) -> list[tuple[Config, Config]]:
    """Refuse now what one of the cells would refuse hours later; returns their configurations."""
    refuse_unwritable_folders({"results_folder": study.results, "run_folder": study.runs})
    different = {(cell.method, cell.size): cell for cell in cells}  # but for their seeds
    stages = [
        (cell.name, *(cell_config(study, cell, stage) for stage in ("prune", "recover")))
        for cell in different.values()
    ]
    check_cells(stages)
    for _, config, recovery in stages:
        check_road(config, recovery, study.modes)
    return [(config, recovery) for _, config, recovery in stages]


def find_study_tasks(study: Study) -> list[Task]:
    """What the models of a study are judged by, loaded."""
    tasks = find_tasks([*map(data_path, study.sts)], []) if study.sts else []
    for name, split in study.retrieval.items():
        tasks += find_tasks([], [data_path(name)], split)
    for path, pairs in study.parallel.items():
        tasks += find_tasks([], [], None, {data_path(path): pairs}, study.lines)
    check_names(tasks)
    return tasks


def _find_reference(study: Study, config: Config, tasks: Sequence[Task]) -> StudyReference:
    """Scores of the original and of the floors, measured once for all cells."""
    path = study.results / REFERENCE
    original = study.original or config.model.base_model
    judged_by = {"tasks": {task.name: task.split for task in tasks}}
    judged_by |= study.model_dump(include={"modes", "max_length"})
    if not path.is_file():
        with lock_of(path):
            if not path.is_file():
                measured = measure_reference(study, config, original, judged_by, tasks)
                # Without locks, another process may have been quicker.
                write_json(measured.as_dict(), path, overwrite=True)
    found = read_reference(study.results)
    if (found.original, found.judged_by) != (original, judged_by):
        raise ConfigError(
            f"{path} is of another original or other tasks and is kept, and so are the cells "
            f"beside it. To fix, set another results_folder in the study."
        )
    return found


def measure_reference(
    study: Study, config: Config, original: str, judged_by: dict[str, Any], tasks: Sequence[Task]
) -> StudyReference:
    """Score the original, its words alone and its shape with random weights."""
    log.info("scoring the original and the floors")
    encoder = load_encoder(original, torch_device(config.device), study.max_length)
    models: dict[str, Callable[[], Encoder]] = {
        "original": lambda: encoder,
        "word_embeddings": lambda: WordEmbeddings(encoder),
        "random_weights": lambda: untrained_encoder(encoder, seed=0),
    }
    scores = {name: score_model(load(), tasks, study.modes) for name, load in models.items()}
    return StudyReference(
        original=original,
        judged_by=judged_by,
        parameters=Parameters(**count_parameters(encoder)),
        scores=ReferenceScores(**scores),
        versions=collect_versions(),
    )


def run_cell(
    study: Study, cell: Cell, tasks: Sequence[Task], reference: StudyReference
) -> StudyCell:
    """Prune or choose, recover, extract and judge; what an earlier call has done is kept."""
    config, recovery = (cell_config(study, cell, stage) for stage in ("prune", "recover"))
    chosen = _make_models(config, recovery)
    started = time.monotonic()
    model, pruned = Path(config.results_folder) / "model", pruned_model_folder(config)
    scores = score_folder(model, config, study, tasks, study.modes)
    cut = measure_cut(config, pruned, study, tasks, reference)
    evaluated = time.monotonic() - started
    described = describe_config(study, cell)
    info = read_record(model / MARKER, PruningRecord, "run the cell again")
    counts = info.parameters
    return StudyCell(
        method=cell.method,
        size=cell.size,
        seed=cell.seed,
        config_hash=hash_config(described),
        encoder_share=counts.extracted.encoder / counts.source.encoder,
        parameters=counts.extracted,
        kept_layers=info.kept.layer,
        **describe_training(config, recovery, chosen, evaluated),
        scores=add_retention(scores, reference.scores.original),
        gates=describe_gates(config, pruned),
        cut=cut,
        versions=collect_versions(),
        machine=describe_machine(torch_device(config.device)),
        config=described,
    )


def score_model(encoder: Encoder, tasks: Sequence[Task], modes: Sequence[str]) -> list[StudyScore]:
    """Main score of a model in every task and mode."""
    kinds = {task.name: task.kind for task in tasks}
    entries = []
    for (task, mode), score in score_tasks(encoder, tasks, modes).items():
        metric, value = next(iter(score.values.items()))
        row = {"task": task, "kind": kinds[task], "mode": mode, "metric": metric, "value": value}
        entries.append(StudyScore(**row))
    return entries


def score_folder(
    folder: Path | str, config: Config, study: Study, tasks: Sequence[Task], modes: Sequence[str]
) -> list[StudyScore]:
    """Main scores of a model folder."""
    encoder = load_encoder(str(folder), torch_device(config.device), study.max_length)
    return score_model(encoder, tasks, modes)


def add_retention(scores: list[StudyScore], originals: Sequence[StudyScore]) -> list[StudyScore]:
    """Add to each score its share of the original's, ``None`` if that is not above 0; in place."""
    by_key = {(entry.task, entry.mode): entry.value for entry in originals}
    for entry in scores:
        original = by_key[entry.task, entry.mode]
        entry.retention = entry.value / original if original > 0 else None
    return scores


def describe_training(
    config: Config, recovery: Config, chosen: float | None, evaluated: float
) -> dict[str, Any]:
    """Steps, tokens and seconds by stage; those of interrupted trainings are whole."""
    with_gates = config.method == L0
    runs = ({"prune": config} if with_gates else {}) | {"recover": recovery}
    progress = {
        stage: checkpoint.read_progress(checkpoint.find_checkpoint(Path(run.run_folder)))
        for stage, run in runs.items()
    }
    seconds = ({} if with_gates else {"choose": chosen}) | {
        stage: found.seconds for stage, found in progress.items()
    }
    return {
        "steps": {stage: found.batches for stage, found in progress.items()},
        "tokens": {stage: found.tokens for stage, found in progress.items()},
        "seconds": {**seconds, "evaluate": evaluated},
    }


def describe_gates(config: Config, pruned: Path) -> GateState | None:
    """How decided the gates were before the cut, and how far from the target; of l0 alone.

    Both are by axis; under ``all`` is the distance over all gates, under ``encoder`` the gap of the
    encoder's parameters.
    """
    if config.method != L0:
        return None
    gates = checkpoint.load_trained_model(_cut_checkpoint(pruned)).l0_module
    constraint = compute_constraint_report(gates, gates.realised_shape())
    gap = {axis: row.expected_sparsity - row.target_sparsity for axis, row in constraint.items()}
    return GateState(distance=distances_to_binary(gates.open_probabilities()), gap=gap)


def measure_cut(
    config: Config, pruned: Path, study: Study, tasks: Sequence[Task], reference: StudyReference
) -> dict[str, Cut]:
    """What the cut itself costs, before any recovery, in Spearman of dense vectors by task.

    Before it a model of gates is scored with every gate at the median of its noise, and for a
    baseline the unpruned model.
    """
    pairs = [task for task in tasks if task.kind == SIMILARITY]
    if not pairs:
        return {}
    if config.method == L0:
        before = score_model(_gated_encoder(config, pruned, study), pairs, ["dense"])
    elif reference.original != config.model.base_model:
        before = score_folder(config.model.base_model, config, study, pairs, ["dense"])
    else:
        before = [e for e in reference.scores.original if e.mode == "dense"]
    values = {entry.task: entry.value for entry in before}
    after = score_folder(pruned, config, study, pairs, ["dense"])
    both = [(e.task, values[e.task], e.value) for e in after if e.task in values]
    return {task: Cut(before=was, after=now, lost=was - now) for task, was, now in both}


def _gated_encoder(config: Config, pruned: Path, study: Study) -> Encoder:
    """The model of a pruning run as it is before the cut."""
    model = checkpoint.load_trained_model(_cut_checkpoint(pruned))
    device = torch_device(config.device)
    gates = vars(model.l0_module.median_masks())
    masks = PruningMasks(**{k: None if z is None else z.to(device) for k, z in gates.items()})
    base = checkpoint.as_base_model(model, "the model before the cut")
    return TextEncoder(base, device, study.max_length, 32, masks)


def _cut_checkpoint(pruned: Path) -> Path:
    """The checkpoint that a pruned model was cut from: perhaps the best, not the newest."""
    return Path(read_record(pruned / MARKER, PruningRecord, "run the cell again").checkpoint)


def _make_models(config: Config, recovery: Config) -> float | None:
    """Train and write the pruned and the recovered model, as far as they do not exist.

    Returns the seconds of a baseline's choice and cut; ``None`` if an earlier call has made it.
    """
    seconds = None
    if not (pruned_model_folder(config) / MARKER).is_file():
        started = time.monotonic()
        prune(config)
        seconds = time.monotonic() - started
    model = Path(config.results_folder) / "model"
    if not (model / MARKER).is_file():
        recover(recovery, model)
    return seconds


def _start_runs(study: Study, cell: Cell) -> None:
    """Note what the runs of a cell are of; those of another configuration are not resumed."""
    note, now = study.runs / f"{cell.name}.json", describe_config(study, cell)
    if note.is_file():
        then = read_record(note, dict[str, Any], "remove the file and the runs beside it")
        if find_differences(then, now):
            log.warning("%s was stopped with another configuration: it begins again", cell.name)
            _remove_runs(study, cell)
    write_json(now, note, overwrite=True)


def _remove_runs(study: Study, cell: Cell) -> None:
    """Free the disk of what a finished cell needs no more."""
    for name in (cell.name, f"{cell.name}-recovery", f"{cell.name}-results"):
        if (study.runs / name).exists():
            shutil.rmtree(study.runs / name)
    (study.runs / f"{cell.name}.json").unlink(missing_ok=True)
