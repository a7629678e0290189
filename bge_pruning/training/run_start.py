"""What is refused before a run has read any weights, and the folder that it gets."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from bge_pruning.config.command_checks import check_baseline, check_training
from bge_pruning.config.load import to_yaml
from bge_pruning.config.names import HUB, L0, check_hub_data
from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.datasets.mteb_dataloader import collection_files
from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.tables import table_paths
from bge_pruning.evaluation.search import check_modes
from bge_pruning.model_io.example_models import EXAMPLE_MODELS
from bge_pruning.model_io.hub import fetch_model_folder, is_hub_name
from bge_pruning.training.plan import Plan, build_loss_weights, build_plan, fetch_plan
from bge_pruning.training.sources import source_reader
from bge_pruning.utils.environment import torch_device
from bge_pruning.utils.files import refuse_unwritable_folders

log = logging.getLogger(__name__)

# Every run folder holds the configuration of its run.
RECORD = "config.yaml"


def check_run(config: Config) -> Plan:
    """Validate the configuration before loading any weights, and return the plan.

    Raises:
        ConfigError: If the configuration does not fit itself or the model.
        OSError: If the run folder is in use, the model cannot be loaded, or a folder not written.
    """
    check_training(config, torch_device(config.device))
    folder = find_base_folder(config)
    if config.model.l0_module is not None and config.model.d_model is not None:
        build_plan(config, folder)  # refuses a bad target before anything is fetched
    check_start(config)
    plan = fetch_plan(config)
    check_outputs(config, plan)
    return plan


def find_base_folder(config: Config) -> Path | None:
    """Folder of the base model; ``None`` of a hub model, which is not fetched for this.

    Raises:
        ConfigError: If a recovery has no extracted model to start from.
        FileNotFoundError: If it is neither a folder nor a hub name, or is not prepared yet.
    """
    name = config.model.base_model
    if Path(name).is_dir():
        return Path(name)
    if config.stage == "recover":
        run = config.run_folder.removesuffix("-recovery")
        step = f"scripts/extract_pruned_model.py {run} {name}"
        if config.method != L0:
            step = "scripts/run_pipeline.py with the same arguments and --only cut"
        raise ConfigError(
            f"stage=recover starts from {name}, which is not there yet. To fix, run {step}."
        )
    for model in EXAMPLE_MODELS.values():
        bare = f"{model.output}-encoder"  # as configurations of heads call it
        if name in (str(model.output), bare):
            step = f"scripts/prepare_model.py {model.key}"
            step += f" --without-heads --output {bare}" if name == bare else ""
            raise FileNotFoundError(f"{name} is not there yet. To fix, run {step}.")
    return None if is_hub_name(name) else fetch_model_folder(name)


def check_planned(config: Config, plan: Plan) -> None:
    """Refuse, after a dry run, what :func:`check_run` would refuse without a network."""
    is_baseline = config.method != L0 and config.model.l0_module is not None
    check_baseline(config) if is_baseline else check_training(config, torch_device(config.device))
    check_start(config)
    check_outputs(config, plan)


def check_outputs(config: Config, plan: Plan) -> None:
    """Refuse losses and evaluations of outputs that the model has no head for."""
    key = "loss"
    try:
        build_loss_weights(config).check_heads(plan.outputs)
        if any(source.is_collection for source in config.data.eval):
            key = "evaluation.modes"
            check_modes(config.evaluation.modes, plan.outputs, config.model.base_model)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_start(config: Config) -> None:
    """Refuse what would stop a run after its models are fetched, see :func:`check_inputs`."""
    check_run_folder(config)
    check_inputs(config)


def check_inputs(config: Config) -> None:
    """Refuse folders that cannot be written, and a teacher or data that are missing or invalid.

    Raises:
        OSError: If a folder cannot be written, or the teacher or a file is missing.
        ValueError: If the first row of a source is invalid.
    """
    if (teacher := config.teacher.base_model) is not None and not is_hub_name(teacher):
        fetch_model_folder(teacher)
    check_sources(config)
    loggers, processed = config.loggers, config.data.processed_folder
    folders = {"run_folder": config.run_folder, "data.processed_folder": processed}
    if loggers.wandb is not None or loggers.tensorboard or loggers.file:
        folders["loggers.folder"] = loggers.folder
    refuse_unwritable_folders(folders)


def check_run_folder(config: Config) -> None:
    """Refuse a folder that is in use, unless its run is resumed or replaced."""
    folder = Path(config.run_folder)
    in_use = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    replaceable = config.overwrite and (folder / RECORD).is_file()
    if in_use and not config.autoresume and not replaceable:
        what = "holds a run already" if (folder / RECORD).is_file() else "is in use"
        raise FileExistsError(
            f"{folder} {what} and is kept. To fix, set another run_name, autoresume=true "
            f"to resume it, or overwrite=true to start again (only if it holds a run)."
        )


def remove_run(folder: Path) -> None:
    """Remove the folder of an earlier run or of its results, if there is one, and say so."""
    if (folder / RECORD).is_file():
        then = time.localtime((folder / RECORD).stat().st_mtime)
        log.warning("replacing the run of %s in %s", time.strftime("%Y-%m-%d %H:%M", then), folder)
    if folder.exists():
        shutil.rmtree(folder)


def prepare_run_folder(config: Config) -> None:
    """Make the run folder and record the configuration in it."""
    check_run_folder(config)
    folder = Path(config.run_folder)
    if not config.autoresume:
        remove_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(to_yaml(config), encoding="utf-8")


def check_sources(config: Config) -> None:
    """Refuse sources that are not here or whose first row is wrong; nothing is fetched.

    Raises:
        OSError: If a file is missing.
        ValueError: If a source has no rows, or the first one is invalid.
    """
    for source in [*config.data.train, *config.data.eval]:
        if source.kind == "beir":
            for path in collection_files(source.place, source.split):
                table_paths(str(path))
        elif source.place.startswith(HUB):
            check_hub_data(source.place.removeprefix(HUB), source.name)
        elif source.kind != "mteb":
            rows = source_reader(source, config)(BadRows(config.data.on_bad_row == "skip"))
            if next(iter(rows), None) is None:
                raise ValueError(f"{source.name}: holds no rows. To fix, choose another file.")
