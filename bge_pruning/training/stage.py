"""One stage of a run in five steps: check it, load its inputs, build the model, prepare, fit."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from composer import Evaluator, Trainer
from composer.core import Algorithm, DataSpec, Event, State
from composer.loggers import Logger
from composer.utils import dist, get_device, reproducibility

from bge_pruning.algorithms.stop_on_signal import StopOnSignal
from bge_pruning.config.checks import check_schedule
from bge_pruning.config.command_checks import check_checkpoint_kind
from bge_pruning.config.schema import Config
from bge_pruning.evaluation.tasks import Task
from bge_pruning.export.pruning_record import compute_constraint_report, warn_if_far
from bge_pruning.model_io.checkpoint import RunMetadata
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.model_io.run_checkpoints import find_whole_checkpoint, list_checkpoints
from bge_pruning.model_io.teacher_folder import Teacher
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.teacher import LAST
from bge_pruning.training import builders, data_builders, sharding
from bge_pruning.training.calibration import order_gates, refit
from bge_pruning.training.held_out import check_held_out
from bge_pruning.training.plan import Plan, build_loss_weights
from bge_pruning.training.plan_text import render_memory, render_run
from bge_pruning.training.rank_watch import RankWatch, ask_rank_zero, on_rank_zero, rank_zero_first
from bge_pruning.training.run_record import record_start
from bge_pruning.training.run_report import extraction_arguments, report_training
from bge_pruning.training.run_start import check_run, prepare_run_folder
from bge_pruning.training.teacher_cache import TeacherTargets
from bge_pruning.utils.guard import warn_only
from bge_pruning.utils.run_log import LOG, RunLog, stoppable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage that was checked."""

    config: Config
    plan: Plan
    is_fresh: bool  # rather than resumed from a checkpoint


@dataclass(frozen=True)
class Inputs:
    """What a stage reads: models and data."""

    base: BaseModel
    teacher: Teacher | None
    metadata: RunMetadata
    evaluators: list[Evaluator]
    collections: dict[str, Task]
    train_loader: DataSpec
    targets: TeacherTargets | None  # those of the teacher that are kept on disk


class RandomStateOnResume(Algorithm):
    """Restores the random state before the first batch after a restart inside an epoch.

    The trainer restores it while it skips the batches that were trained on. Our data resume without
    skipping, where the trainer does not restore it: dropout would draw other numbers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def match(self, event: Event, state: State) -> bool:
        """Run before the first batch, after the loader has drawn its own seed."""
        return event == Event.BATCH_START and self.trainer._rng_state is not None

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Restore the state of the checkpoint."""
        reproducibility.load_rng_state(self.trainer._rng_state)
        self.trainer._rng_state = None


@contextmanager
def all_ranks(config: Config) -> Iterator[RankWatch]:
    """Join the ranks for a command, or for one of its stages, and watch them while it lasts.

    Raises:
        StoppedError: If a signal ends the body; it says how to go on.
    """
    dist.initialize_dist(get_device(config.device), config.dist_timeout)
    with stoppable(how_to_resume(config)), RankWatch() as watch:
        yield watch


def how_to_resume(config: Config) -> str:
    """What to do about a run that was stopped."""
    return "run the same command " + ("again" if config.autoresume else "with autoresume=true")


def run_stage(
    config: Config, watch: RankWatch, run_log: RunLog, extract: str | None = None
) -> None:
    """Run a stage, on one of the ranks; the log gets a file once there is a run folder.

    Where nothing follows by itself, ``extract`` is how the extraction is called: the log ends with
    that command.
    """
    stage = check_stage(config)
    inputs = load_inputs(stage)
    model = build_student(stage, inputs)
    open_run_folder(stage, inputs, run_log)
    stop = StopOnSignal(how_to_resume(config))
    watching = (model, inputs.metadata, inputs.base, inputs.collections)
    callbacks = builders.build_callbacks(config, *watching)
    data = (inputs.train_loader, inputs.evaluators)
    trainer = builders.build_trainer(config, model, *data, callbacks, stop)
    # A resumed run draws the numbers of an uninterrupted one.
    trainer.state.algorithms.append(RandomStateOnResume(trainer))
    try:
        fit(stage, inputs, trainer, stop)
        on_rank_zero(lambda: report(stage, inputs, model, extract))
        # The trainer would wait for the first rank's loggers, but not as long as it takes.
        with rank_zero_first():
            trainer.engine.close()
    except BaseException as error:
        watch.tell(error)
        trainer.engine.close()
        raise


def check_stage(config: Config) -> Stage:
    """Refuse what cannot be run before any weights are read."""
    plan, folder = check_run(config), Path(config.run_folder)
    log.info("%s\n%s", config.run_folder, "\n".join(render_run(plan, config)))
    if not config.autoresume:
        return Stage(config, plan, is_fresh=True)

    def look() -> bool:
        check_checkpoint_kind(config, find_whole_checkpoint(folder))  # puts damaged ones aside
        return not list_checkpoints(folder)

    return Stage(config, plan, is_fresh=ask_rank_zero(look))


def load_inputs(stage: Stage) -> Inputs:
    """Read models and data."""
    config = stage.config
    base = builders.build_base_model(config)
    teacher = builders.build_teacher(config, base)
    metadata = builders.build_metadata(config, stage.plan, base)
    # Before the teacher embeds the training texts, which may take long.
    evaluators = data_builders.build_evaluators(config, base)
    collections = data_builders.build_collections(config, base)
    check_held_out(config, base, collections, refuse=stage.is_fresh)
    loader = data_builders.build_train_loader(config, base, teacher)
    check_schedule(config, len(loader.dataloader))
    sampler, names = loader.dataloader.batch_sampler, build_loss_weights(config)
    wanted = (LAST,) if config.model.freeze_encoder else names.distilled
    targets = TeacherTargets(config, base, teacher, wanted, sampler)
    if not (wanted and targets.decide()):
        targets = None
    inputs = Inputs(base, teacher, metadata, evaluators, collections, loader, targets)
    # Not in the plan, which would assume that all texts are as long as allowed.
    widest = sampler.widest_batch(config.device_train_microbatch_size)
    log.info("%s", render_memory(stage.plan, _settled(config, inputs), widest))
    return inputs


def _settled(config: Config, inputs: Inputs) -> Config:
    """The configuration with ``teacher.cache`` as it was chosen."""
    return replace(config, teacher=replace(config.teacher, cache=inputs.targets is not None))


def build_student(stage: Stage, inputs: Inputs) -> ComposerBGEM3:
    """The model to train: refitted before it is built, its gates ordered after that.

    The first rank does both, and all ranks begin with its numbers: on another machine they could be
    others, and each rank would train a model of its own.
    """
    config, base = stage.config, inputs.base
    if stage.is_fresh and config.stage == "recover" and config.teacher.refit_texts:
        on_rank_zero(lambda: refit(config, base))
    settled = _settled(config, inputs)
    model = builders.build_model(settled, base, inputs.metadata, inputs.teacher)
    l0 = config.model.l0_module
    if stage.is_fresh and l0 is not None and l0.init_order != "random":
        on_rank_zero(lambda: order_gates(config, base, model.l0_module.log_alpha))
    sharding.copy_from_rank_zero(model, config.device)
    return model


def open_run_folder(stage: Stage, inputs: Inputs, run_log: RunLog) -> None:
    """Make the run folder, now that nothing in the data can stop the run."""

    def make() -> None:
        prepare_run_folder(stage.config)
        record_start(stage.config, inputs.metadata.versions, dist.get_world_size())

    on_rank_zero(make)
    run_log.open(Path(stage.config.run_folder) / LOG)


def fit(stage: Stage, inputs: Inputs, trainer: Trainer, stop: StopOnSignal) -> None:
    """Train to the end, unless the run is there already, which Composer calls an error."""
    end = trainer.state.max_duration
    if end is not None and trainer.state.timestamp.get(end.unit) >= end:
        log.info("%s is trained to its end already", stage.config.run_folder)
        return
    if inputs.targets is not None:  # only now is known from where the run goes on
        inputs.targets.prepare()
    with stop:
        trainer.fit()
    log.info("trained to the end")


def report(stage: Stage, inputs: Inputs, model: ComposerBGEM3, extract: str | None = None) -> None:
    """Write the report of the training, and say what comes next."""
    retry = f"run scripts/write_report.py {stage.config.run_folder} --overwrite"
    with warn_only("the report of the training", retry):
        versions, ranks = inputs.metadata.versions, dist.get_world_size()
        report_training(stage.config, model.l0_module, versions, ranks)
    if extract is not None:
        log.info("next: %s %s", extract, shlex.join(extraction_arguments(stage.config)))
    # At last, because it is what matters; in other workflows what follows says it.
    if extract is not None and model.l0_module is not None:
        shape = model.l0_module.realised_shape()
        warn_if_far(compute_constraint_report(model.l0_module, shape))
