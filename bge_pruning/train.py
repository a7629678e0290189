"""Train a model with gates (prune), or the extracted model without them (recover).

Launch:
    composer -n 1 -m bge_pruning.train CONFIG.yaml [more.yaml ...] [key=value ...]
    python -m bge_pruning.train CONFIG.yaml [more.yaml ...] [key=value ...]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bge_pruning.config.shipped import CONFIG_HELP, split_arguments
from bge_pruning.training.run_folder import check_run, prepare_run_folder
from bge_pruning.utils.guard import run_command
from bge_pruning.utils.run_log import StoppedError

if TYPE_CHECKING:
    from composer import Trainer

    from bge_pruning.training.rank_watch import RankWatch
    from bge_pruning.utils.run_log import RunLog


# Not __name__, which python -m makes __main__: outside of the package's logger nobody listens.
log = logging.getLogger("bge_pruning.train")


def main(argv: Sequence[str] | None = None, prog: str = "python -m bge_pruning.train") -> int:
    """Run the command line of a training; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Prune a model with learned gates, or train an extracted model on.",
        epilog="dry_run=true prints the plan and stops; stage=recover trains the extracted model. "
        "Every key is listed in bge_pruning/config/schema.py.",
    )
    parser.add_argument("config", nargs="+", help=CONFIG_HELP)
    paths, overrides = split_arguments(parser.parse_args(argv).config)

    def command() -> None:
        from bge_pruning.config.load import load_config

        config = load_config(paths, overrides)
        if config.dry_run:
            from bge_pruning.training.plan import build_plan, render_plan

            sys.stdout.write(render_plan(build_plan(config), config) + "\n")
        else:
            train(config)

    return run_command(command)


def train(config) -> Path:  # noqa: ANN001  (Config; imported late so that --help is quick)
    """Run a training stage.

    Args:
        config: The run, a :class:`bge_pruning.config.load.Config`.

    Returns:
        The run folder, with checkpoints, ``config.yaml``, ``run.json``, ``metrics.jsonl``,
        ``train.log`` and the report.

    Raises:
        ConfigError: If the configuration does not fit the model or the data.
        FileExistsError: If the run folder is in use and neither ``autoresume`` nor ``overwrite``
            is set.
        OSError: If the model cannot be had.
        StoppedError: If the run was told to stop; it can go on.
        ValueError: If the run is to go on, and all its checkpoints are damaged.
    """
    from composer.utils import dist, get_device

    from bge_pruning.training.rank_watch import RankWatch
    from bge_pruning.utils.run_log import RunLog

    dist.initialize_dist(get_device(config.device), config.dist_timeout)
    with RunLog(dist.get_global_rank()) as run_log, RankWatch(StoppedError) as watch:
        _train(config, watch, run_log)
    return Path(config.run_folder)


def _train(config, watch: RankWatch, run_log: RunLog) -> None:  # noqa: ANN001
    """Run a stage, on one of the ranks."""
    from composer.utils import dist

    from bge_pruning.algorithms.stop_on_signal import StopOnSignal
    from bge_pruning.model_io.run_checkpoints import find_whole_checkpoint, list_checkpoints
    from bge_pruning.training import builders, data_builders
    from bge_pruning.training.calibration import order_gates, refit
    from bge_pruning.training.plan import render_memory, render_plan
    from bge_pruning.training.run_record import record_start
    from bge_pruning.training.run_report import report_training
    from bge_pruning.training.sharding import check_kind
    from bge_pruning.utils.guard import warn_only
    from bge_pruning.utils.run_log import LOG

    plan = check_run(config)
    log.info("%s\n%s", config.run_folder, render_plan(plan, config))
    if config.autoresume and dist.get_global_rank() == 0:
        check_kind(config, find_whole_checkpoint(Path(config.run_folder)))
    base = builders.build_base_model(config)
    teacher = builders.build_teacher(config, base)
    metadata = builders.build_metadata(config, plan, base)
    # Before the teacher embeds the training texts, which may take long.
    evaluators = data_builders.build_evaluators(config, base)
    collections = data_builders.build_collections(config, base)
    train_loader = data_builders.build_train_loader(config, base, teacher)
    # Known now that the texts are: the plan had to assume that all are as long as may be.
    widest = train_loader.dataloader.batch_sampler.widest_batch(config.device_train_microbatch_size)
    log.info("the largest batch\n%s", render_memory(plan, config, widest))
    begins = not (config.autoresume and list_checkpoints(Path(config.run_folder)))
    if begins and config.stage == "recover" and config.teacher.refit_texts:
        refit(config, base)
    model = builders.build_model(config, base, metadata, teacher)
    if begins and model.l0_module is not None and config.model.l0_module.init_order != "random":
        order_gates(config, base, model.l0_module.log_alpha)
    prepare_run_folder(config)  # now that nothing in the data can stop the run
    run_log.open(Path(config.run_folder) / LOG)
    if dist.get_global_rank() == 0:
        record_start(config, metadata.versions, dist.get_world_size())
    callbacks = builders.build_callbacks(config, model, metadata, base, collections)
    stop = StopOnSignal()
    trainer = builders.build_trainer(config, model, train_loader, evaluators, callbacks, stop)
    builders.restore_random_state(trainer)
    try:
        if _is_finished(trainer):
            log.info("%s is trained to its end already", config.run_folder)
        else:
            with stop:
                trainer.fit()
            log.info("trained to the end")
        if dist.get_global_rank() == 0:
            retry = f"run scripts/write_report.py {config.run_folder} --overwrite"
            with warn_only("the report of the training", retry):
                report_training(config, model.l0_module, metadata.versions, dist.get_world_size())
    except BaseException as error:
        watch.tell(error)  # the trainer closes what the others wait for
        with contextlib.suppress(RuntimeError):  # another rank may be gone: that is not the error
            trainer.close()
        raise
    trainer.close()


def _is_finished(trainer: Trainer) -> bool:
    """Whether a run that is to go on has nothing left to do, which Composer calls an error."""
    end = trainer.state.max_duration
    return end is not None and trainer.state.timestamp.get(end.unit) >= end


if __name__ == "__main__":
    sys.exit(main())
