"""What is measured of a cell of a study: scores, sizes, steps, gates, and what the cut cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.config.load import Config
from bge_pruning.config.schema import L0
from bge_pruning.utils.devices import torch_device
from bge_pruning.utils.records import read_record
from bge_pruning.workflows.study_file import Study

if TYPE_CHECKING:
    from bge_pruning.evaluation.encoders import Encoder
    from bge_pruning.evaluation.tasks import Task

Entry = dict[str, Any]


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


def score_folder(
    folder: Path | str, config: Config, study: Study, tasks: Sequence[Task], modes: Sequence[str]
) -> list[Entry]:
    """The same of a model folder, see :func:`score_model`."""
    from bge_pruning.evaluation.encoders import load_encoder

    return score_model(
        load_encoder(str(folder), torch_device(config.device), study.max_length), tasks, modes
    )


def add_retention(scores: list[Entry], originals: Sequence[Entry]) -> list[Entry]:
    """Add to each score its share of the original's, ``None`` if that is not above 0.

    Args:
        scores: Of a model; changed.
        originals: Of the original.
    """
    by_key = {(entry["task"], entry["mode"]): entry["value"] for entry in originals}
    for entry in scores:
        original = by_key[entry["task"], entry["mode"]]
        entry["retention"] = entry["value"] / original if original > 0 else None
    return scores


def describe_model(model: Path) -> dict[str, Any]:
    """True sizes of an extracted model, of its folder."""
    from bge_pruning.export.pruning_record import MARKER
    from bge_pruning.utils.record_schemas import PRUNING

    info = read_record(model / MARKER, PRUNING, "run the cell again")
    counts = info["parameters"]
    return {
        "encoder_share": counts["extracted"]["encoder"] / counts["source"]["encoder"],
        "parameters": counts["extracted"],
        "kept_layers": info["kept"]["layer"],
    }


def describe_training(
    config: Config, recovery: Config, chosen: float | None, evaluated: float
) -> dict[str, Any]:
    """Steps, tokens and seconds by stage; those of interrupted trainings are whole."""
    from bge_pruning.model_io.checkpoint import find_checkpoint, read_progress

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


def describe_gates(config: Config, pruned: Path) -> dict[str, Any] | None:
    """How decided the gates were before the cut, and how far from the target; of l0 alone.

    Returns:
        ``distance``, the mean over the gates of an axis of the distance of a gate's open
        probability to 0 or 1, and ``gap``, expected minus target sparsity, both by axis; under
        ``all`` the distance over all gates, under ``encoder`` the gap of the encoder's parameters.
    """
    from bge_pruning.export.pruning_record import compute_constraint_report
    from bge_pruning.model_io.checkpoint import load_trained_model
    from bge_pruning.models.l0_module_embedding import distances_to_binary

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


def measure_cut(
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
    elif reference["original"] != config.model.base_model:
        before = score_folder(config.model.base_model, config, study, pairs, ["dense"])
    else:
        before = [e for e in reference["scores"]["original"] if e["mode"] == "dense"]
    values = {entry["task"]: entry["value"] for entry in before}
    after = score_folder(pruned, config, study, pairs, ["dense"])
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
    from bge_pruning.model_io.checkpoint import as_base_model, load_trained_model
    from bge_pruning.models.structural_pruning import PruningMasks

    model = load_trained_model(_cut_checkpoint(pruned))
    device = torch_device(config.device)
    gates = vars(model.l0_module.median_masks())
    masks = PruningMasks(**{k: None if z is None else z.to(device) for k, z in gates.items()})
    base = as_base_model(model, "the model before the cut")
    return TextEncoder(base, device, study.max_length, 32, masks)


def _cut_checkpoint(pruned: Path) -> Path:
    """The checkpoint that a pruned model was cut from: perhaps the best, not the newest."""
    from bge_pruning.export.pruning_record import MARKER
    from bge_pruning.utils.records import TEXT

    record = read_record(pruned / MARKER, {"checkpoint": TEXT}, "run the cell again")
    return Path(record["checkpoint"])
