"""What a finished run leaves for people: its report, and the same on W&B if that is configured."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bge_pruning.models.gate_file import save_gates
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.utils.evaluation import write_json, write_text
from bge_pruning.utils.report import write_report
from bge_pruning.utils.report_inputs import COMMANDS, VERSIONS
from bge_pruning.utils.wandb_report import log_report, log_scores

if TYPE_CHECKING:
    from bge_pruning.config import Config


def report_training(
    config: Config, l0_module: L0Module | None, versions: dict[str, str], world_size: int
) -> None:
    """Write what is known after training into the run folder, over an earlier report of the run.

    Args:
        config: The run.
        l0_module: Its gates.
        versions: Package versions by name.
        world_size: Ranks that trained.
    """
    folder = Path(config.run_folder)
    if l0_module is not None:
        save_gates(l0_module, folder / "gates.npz")
    write_json(versions, folder / VERSIONS, overwrite=True)
    write_text(folder / COMMANDS, training_command(config, world_size) + "\n")
    write_report(folder, overwrite=True)
    if config.loggers.wandb is not None:
        import wandb

        log_report(wandb.run, folder)  # the run that the trainer's logger has opened


def training_command(config: Config, world_size: int) -> str:
    """The command that trains the same into a folder beside the run's."""
    launcher = f"composer -n {world_size} -m" if world_size > 1 else "python -m"
    # A recovery appends its suffix to the folder that it is given.
    suffix = "-recovery" if config.stage == "recover" else ""
    folder = f"run_folder={config.run_folder.removesuffix(suffix)}-again"
    record = str(Path(config.run_folder) / "config.yaml")
    return f"{launcher} bge_pruning.train {shlex.join([record, folder])}"


def log_results(config: Config, evaluation: dict[str, Any]) -> None:
    """Send the report of the results and their scores to W&B, as a run of its own.

    Args:
        config: The run; nothing is done if it does not configure W&B.
        evaluation: Content of ``evaluation.json``.
    """
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
