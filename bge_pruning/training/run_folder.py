"""The folder of a run: whether it may be used, and its first contents."""

from __future__ import annotations

import shutil
from pathlib import Path

from composer.utils import dist

from bge_pruning.config.command_checks import check_training
from bge_pruning.config.load import to_yaml
from bge_pruning.config.schema import Config
from bge_pruning.model_io.hub import fetch_model_folder
from bge_pruning.training.plan import Plan, build_plan
from bge_pruning.utils.environment import torch_device
from bge_pruning.utils.files import refuse_unwritable_folders

# Every run folder holds the configuration of its run.
RECORD = "config.yaml"


def check_run(config: Config) -> Plan:
    """Validate the configuration before loading any weights, and return the plan.

    Raises:
        ConfigError: If the configuration does not fit itself or the model.
        FileExistsError: If the run folder is in use.
        OSError: If the model cannot be loaded.
        PermissionError: If a folder cannot be written to.
    """
    check_training(config, torch_device(config.device))
    if config.model.l0_module is not None and config.model.d_model is not None:
        build_plan(config)  # refuses a bad target before anything is fetched
    check_run_folder(config)
    refuse_unwritable_folders(_written_folders(config))
    folder = fetch_model_folder(config.model.base_model, config.model.revision)
    return build_plan(config, folder)


def _written_folders(config: Config) -> dict[str, str]:
    """The folders that a training writes to, by key."""
    folders = {
        "run_folder": config.run_folder,
        "data.processed_folder": config.data.processed_folder,
    }
    loggers = config.loggers
    if loggers.wandb is not None or loggers.tensorboard or loggers.file:
        folders["loggers.folder"] = loggers.folder
    return folders


def check_run_folder(config: Config) -> None:
    """Refuse a folder that is in use, unless its run is resumed or replaced.

    Raises:
        FileExistsError: If the folder is in use.
    """
    folder = Path(config.run_folder)
    in_use = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    replaceable = config.overwrite and (folder / RECORD).is_file()
    if in_use and not config.autoresume and not replaceable:
        raise FileExistsError(
            f"{folder} is in use and is kept. To fix, set another run_name, autoresume=true "
            f"to resume it, or overwrite=true to start again (only if it holds a run)."
        )


def prepare_run_folder(config: Config) -> None:
    """Make the run folder and record the configuration in it; on rank 0 only.

    Raises:
        FileExistsError: If the folder is in use.
    """
    check_run_folder(config)
    dist.barrier()
    if dist.get_global_rank() == 0:
        folder = Path(config.run_folder)
        if folder.exists() and not config.autoresume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(to_yaml(config), encoding="utf-8")
    dist.barrier()
