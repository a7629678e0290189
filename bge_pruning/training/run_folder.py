"""The folder of a run: whether it may be used, and what is put into it first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bge_pruning.training.plan import Plan

# Every run folder holds the configuration of its run.
RECORD = "config.yaml"


def check_run(config) -> Plan:  # noqa: ANN001
    """Refuse what can be refused before any work is done, and plan the rest.

    Raises:
        ConfigError: If the configuration does not fit itself or the model.
        FileExistsError: If the run folder is in use.
        OSError: If the model cannot be had.
        PermissionError: If a folder cannot be written to.
    """
    from bge_pruning.config.load import ConfigError
    from bge_pruning.model_io.hub import fetch_model_folder
    from bge_pruning.training.data_builders import check_objective
    from bge_pruning.training.plan import build_plan
    from bge_pruning.training.sharding import check_sharding
    from bge_pruning.utils.devices import torch_device
    from bge_pruning.utils.files import refuse_unwritable_folders

    if config.method != "l0" and config.model.l0_module is not None:
        raise ConfigError(
            f"method '{config.method}' trains no gates. To fix, run scripts/run_pipeline.py, "
            f"or this with stage=recover after scripts/run_pipeline.py --only cut."
        )
    if config.model.l0_module is not None and config.model.d_model is not None:
        build_plan(config)  # refuses a bad target before anything is fetched
    if config.precision == "amp_fp16" and torch_device(config.device) == "cpu":
        raise ConfigError(
            "precision amp_fp16 needs a GPU: float16 gradients are scaled there alone. To fix, set "
            "precision to fp32 or amp_bf16."
        )
    check_objective(config)
    check_sharding(config)
    check_run_folder(config)
    refuse_unwritable_folders(_written_folders(config))
    folder = fetch_model_folder(config.model.base_model, config.model.revision)
    return build_plan(config, folder)


def _written_folders(config) -> dict[str, str]:  # noqa: ANN001
    """Where a training writes to, by key."""
    folders = {
        "run_folder": config.run_folder,
        "data.processed_folder": config.data.processed_folder,
    }
    loggers = config.loggers
    if loggers.wandb is not None or loggers.tensorboard or loggers.file:
        folders["loggers.folder"] = loggers.folder
    return folders


def check_run_folder(config) -> None:  # noqa: ANN001
    """Refuse a folder that is in use, unless its run is to go on or to be replaced.

    Raises:
        FileExistsError: See :func:`train`.
    """
    folder = Path(config.run_folder)
    in_use = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    replaceable = config.overwrite and (folder / RECORD).is_file()
    if in_use and not config.autoresume and not replaceable:
        raise FileExistsError(
            f"{folder} is in use and is kept. To fix, set another run_name, autoresume=true "
            f"to go on, or overwrite=true to start again (only if it holds a run)."
        )


def prepare_run_folder(config) -> None:  # noqa: ANN001
    """Make the run folder and record the configuration in it; on rank 0 only.

    Raises:
        FileExistsError: See :func:`train`.
    """
    from composer.utils import dist

    from bge_pruning.config.load import to_yaml

    check_run_folder(config)
    dist.barrier()
    if dist.get_global_rank() == 0:
        folder = Path(config.run_folder)
        if folder.exists() and not config.autoresume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(to_yaml(config), encoding="utf-8")
    dist.barrier()
