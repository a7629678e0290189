"""Write the report of a finished run, and send it to W&B if that is configured."""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict
from pathlib import Path

from bge_pruning.config.load import pruned_model_folder
from bge_pruning.config.names import L0
from bge_pruning.config.schema import Config, ExportConfig
from bge_pruning.export.pruning_record import MARKER
from bge_pruning.model_io.run_checkpoints import save_gates, write_gates
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.reports.report import write_report
from bge_pruning.reports.report_data import COMMANDS, VERSIONS
from bge_pruning.reports.wandb_report import log_report, log_scores
from bge_pruning.utils.files import write_json, write_text
from bge_pruning.utils.json_records import read_record
from bge_pruning.utils.records import EvaluationRecord, PruningRecord

log = logging.getLogger(__name__)


def report_training(
    config: Config, l0_module: L0Module | None, versions: dict[str, str], world_size: int
) -> None:
    """Write the report of a training into its run folder, over an earlier one."""
    folder = Path(config.run_folder)
    if l0_module is not None:
        save_gates(l0_module, folder / "gates.npz")
    write_json(versions, folder / VERSIONS, overwrite=True)
    write_text(folder / COMMANDS, training_command(config, world_size) + "\n")
    log.info("the report of the training is %s", write_report(folder, overwrite=True))
    if config.loggers.wandb is not None:
        import wandb

        log_report(wandb.run, folder)  # the run that the trainer's logger has opened


def training_command(config: Config, world_size: int) -> str:
    """The command that repeats a training in a folder beside its run folder."""
    launcher = f"composer -n {world_size} -m" if world_size > 1 else "python -m"
    # A recovery appends its suffix to the folder that it is given.
    suffix = "-recovery" if config.stage == "recover" else ""
    folder = f"run_folder={config.run_folder.removesuffix(suffix)}-again"
    record = str(Path(config.run_folder) / "config.yaml")
    return f"{launcher} bge_pruning.train {shlex.join([record, folder])}"


def extraction_arguments(config: Config) -> list[str]:
    """Arguments of ``scripts/extract_pruned_model.py`` that extract a finished training."""
    best = [] if config.evaluation.keep_best is None else ["--best"]
    again = ["--overwrite"] if config.overwrite else []
    if config.stage == "prune":
        return [config.run_folder, str(pruned_model_folder(config)), *best, *again]
    model = str(Path(config.results_folder) / "model")
    return [config.run_folder, model, *best, *again, *_export_arguments(config)]


def _export_arguments(config: Config) -> list[str]:
    plain, words = ExportConfig(), []
    for name, value in asdict(config.export).items():
        if value == getattr(plain, name):
            continue
        words.append("--" + name.replace("_", "-"))
        if name == "languages":
            words.append(",".join(value))
        elif isinstance(value, list):
            words += value
        elif value is not True:
            words.append(str(value))
    return words


def log_results(config: Config, evaluation: EvaluationRecord) -> None:
    """Send the report of the results and their scores to a W&B run of its own, if configured."""
    w = config.loggers.wandb
    if w is None:
        return
    import wandb

    folder = Path(config.loggers.folder) / config.run_name
    folder.mkdir(parents=True, exist_ok=True)
    place = {"project": w.project, "entity": w.entity, "mode": w.mode, "dir": str(folder)}
    with wandb.init(**place, name=f"{config.run_name}-results", job_type="results") as run:
        log_report(run, Path(config.results_folder))
        log_scores(run, evaluation)


def collect_run(results: Path, run: Path) -> None:
    """Copy the files that a report needs of a run and its recovery into the results folder.

    Raises:
        FileNotFoundError: If a folder is missing or incomplete.
    """
    recovery = run.with_name(f"{run.name}-recovery")
    gated = _has_gates(results / "model" / MARKER)
    sources = {
        "metrics-recovery.jsonl": recovery / "metrics.jsonl",
        MARKER: results / "model" / MARKER,
    }
    if gated:
        sources["metrics.jsonl"] = run / "metrics.jsonl"
    if not (results / "config.yaml").is_file():  # the steps were run one by one
        sources["config.yaml"] = (run if gated else recovery) / "config.yaml"
    for source in sources.values():  # check all of them before the first is copied
        if not source.is_file():
            raise FileNotFoundError(
                f"{source}: no such file. To fix, prune, recover and extract first (the pipeline's "
                f"steps are in its commands.txt), or report the run folder alone."
            )
    if gated:
        write_gates(_checkpoint_of(results, run), results / "gates.npz")
    for name, source in sources.items():
        write_text(results / name, source.read_text(encoding="utf-8"))


def _has_gates(record: Path) -> bool:
    """Whether a model was cut by gates rather than by a baseline."""
    if not record.is_file():  # the caller reports it with the other missing files
        return True
    return (read_record(record, PruningRecord, "extract the model again").method or L0) == L0


def _checkpoint_of(results: Path, run: Path) -> Path:
    """The checkpoint that the pruned model was cut from, which may be the best one."""
    record = results / "pruned_model" / MARKER
    if not record.is_file():
        return run
    name = read_record(record, PruningRecord, "extract the model again").checkpoint
    checkpoint = run / Path(name or "").name
    return checkpoint if checkpoint.is_file() else run
