"""Build the models, callbacks and the trainer of a run from its configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from composer import Evaluator, Trainer
from composer.core import Algorithm, Callback, DataSpec
from composer.loggers import FileLogger, LoggerDestination, TensorboardLogger
from composer.utils import dist
from torch import Tensor

from bge_pruning.algorithms.gradient_groups import GroupGradientClipping, MeanGradients
from bge_pruning.algorithms.non_finite import NonFiniteGuard
from bge_pruning.algorithms.pruning_schedule import PruningSchedule
from bge_pruning.algorithms.row_updates import RowGradients
from bge_pruning.algorithms.source_weights import SourceWeights
from bge_pruning.algorithms.stop_on_signal import StopOnSignal
from bge_pruning.callbacks.best_checkpoint import BestCheckpoint
from bge_pruning.callbacks.data_callback import DataCallback
from bge_pruning.callbacks.embedding_callback import EmbeddingCallback
from bge_pruning.callbacks.evaluation_callback import EvaluationCallback
from bge_pruning.callbacks.loggers import MetricsFile, WandBLogger
from bge_pruning.callbacks.progress_log import ProgressLog
from bge_pruning.callbacks.pruning_callback import GateMapCallback, PruningCallback
from bge_pruning.callbacks.pruning_warnings import PruningWarnings
from bge_pruning.callbacks.run_metadata_callback import RunMetadataCallback
from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.evaluation.tasks import Task
from bge_pruning.model_io.checkpoint import RunMetadata, allow_plain_types, build_l0_module
from bge_pruning.model_io.model_files import read_special_ids
from bge_pruning.model_io.pretrained import BaseModel, load_base_model
from bge_pruning.model_io.run_checkpoints import CHECKPOINT
from bge_pruning.model_io.teacher_folder import Teacher
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.model_registry import build_composer_model
from bge_pruning.models.teacher import LAST
from bge_pruning.training import sharding
from bge_pruning.training.data_builders import build_probes
from bge_pruning.training.optimization import build_optimizer, build_scheduler
from bge_pruning.training.plan import Plan, build_loss_weights
from bge_pruning.utils.environment import torch_device

log = logging.getLogger(__name__)

VERSIONED = ("torch", "mosaicml", "transformers", "sentence-transformers", "tokenizers")


def build_metadata(config: Config, plan: Plan, base: BaseModel) -> RunMetadata:
    """Build what checkpoints carry, so that extraction needs nothing else."""
    l0, s = config.model.l0_module, base.shape
    arguments = target = None
    if plan.target is not None:  # with the outer parts that the loaded weights have
        outer = {"sparse_head": s.sparse_head, "colbert_dim": s.colbert_dim}
        target = asdict(replace(plan.target, pooler=s.pooler, **outer))
    if l0 is not None:
        budget = ("target_parameters", "target_speedup", "target_length")
        options = ("start_sparsity", "init_mean", "init_std", "binarization")
        arguments = {"axes": list(plan.axes), "target": target, "seed": config.seed}
        arguments |= {name: getattr(plan, name) for name in budget}
        arguments |= {name: getattr(l0, name) for name in options}
    same = ("prompts", "license", "origin", "hf_config", "max_seq_length", "tokenizer_files")
    return RunMetadata(
        base_model=base.name,
        revision=config.model.revision,
        shape=asdict(base.shape),
        pooling=base.heads.pooling,
        seed=config.seed,
        l0_module=arguments,
        source_pruning=None if base.pruning is None else base.pruning.as_dict(),
        refit_texts=config.teacher.refit_texts if config.stage == "recover" else 0,
        versions=package_versions(),
        **{name: getattr(base, name) for name in same},
    )


def package_versions(names: Sequence[str] = VERSIONED) -> dict[str, str]:
    """Versions of Python and of packages; by default of those that results depend on."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def build_base_model(config: Config) -> BaseModel:
    """Load the model that training starts from, without the projection of its folder.

    Losses, gates and evaluations work in the encoder's own dimensions. A projection fits the
    weights that it was made from alone; extraction makes a new one.
    """
    m = config.model
    new_heads = (m.init_missing_heads, m.colbert_dim, m.replace_heads)
    base = load_base_model(m.base_model, m.revision, m.pooling, m.dropout, *new_heads)
    if base.projection is None:
        return base
    advice = "Extract with --keep-dimension to get a new one."
    if m.l0_module is not None:  # its kept dimensions are those of the encoder
        advice = "For an index of its vectors, prune the model that it was cut from."
    log.warning(
        "%s: its projection to %d dimensions is left out, training is in the %d of the encoder. %s",
        *(base.name, base.dense_size(), base.shape.hidden_size, advice),
    )
    return replace(base, projection=None)


def build_teacher(config: Config, base: BaseModel) -> Teacher | None:
    """Build the unpruned model, if the loss distils or negatives are mined.

    It is the configured teacher, or else the model that the run prunes. A recovery starts from an
    extracted model, whose teacher is the model that it was cut from. A frozen encoder is its own.
    """
    names = set(build_loss_weights(config).distilled)
    if config.model.freeze_encoder:  # which teaches its own states
        names.add(LAST)
    if any(source.mined_negatives for source in config.data.train):
        names.add("dense_vecs")
    if not names:
        return None
    source, revision = config.model.base_model, config.model.revision
    if config.model.freeze_encoder:
        return Teacher(source, revision, base.heads.pooling, sorted(names), base)
    if base.pruning is not None:
        source, revision = base.pruning.source.base_model, base.pruning.source.revision
    name = config.teacher.base_model or source
    # A configured teacher has its own revision and pooling.
    revision = revision if name == source else None
    pooling = base.heads.pooling if name == source else None
    return Teacher(name, revision, pooling, sorted(names))


def build_model(
    config: Config, base: BaseModel, metadata: RunMetadata, teacher: Teacher | None
) -> ComposerBGEM3:
    """Build the model to train."""
    weights = build_loss_weights(config)
    on_the_fly = weights.distils and config.teacher.cache is False
    l0 = config.model.l0_module
    if config.model.freeze_embeddings:
        base.backbone.embeddings.freeze_tables()
    base.backbone.activation_checkpointing = config.model.activation_checkpointing
    if config.model.compile:
        base.backbone.compile_encoder(training=True)
    encoder = teacher.encoder() if on_the_fly else None
    if encoder is not None and config.model.freeze_embeddings and not config.parallelism.fsdp:
        encoder.backbone.embeddings.share_tables(base.backbone.embeddings)
    model = build_composer_model(
        config.model.name,
        backbone=base.backbone,
        heads=base.heads,
        l0_module=build_l0_module(base.shape, metadata.l0_module),
        loss_weights=weights,
        teacher=encoder,
        teacher_dimensions=_teacher_dimensions(config, base, teacher),
        teacher_layers=None if base.pruning is None else base.pruning.kept.layer,
        eval_target_model=True if l0 is None else l0.eval_target_model,
        special_ids=sorted(read_special_ids(base.tokenizer_files)),
        chunk_size=config.device_train_microbatch_size if config.loss.compares_texts else None,
        cpu_dtype=torch.bfloat16 if config.precision == "amp_bf16" else None,
        freeze_encoder=config.model.freeze_encoder,
    )
    if not config.parallelism.fsdp:  # a sharded table needs gradients of all its rows
        model.update_drawn_rows()
    return model


def _teacher_dimensions(config: Config, base: BaseModel, teacher: Teacher | None) -> Tensor | None:
    loss = config.loss
    if teacher is None or not (loss.distillation_alignment or loss.distillation_hidden):
        return None  # similarities need no common dimensions
    if teacher.hidden_size() == base.shape.hidden_size:
        return None
    kept = [] if base.pruning is None else base.pruning.kept.hidden or []
    if len(kept) != base.shape.hidden_size:
        raise ConfigError(
            f"teacher '{teacher.name}' has {teacher.hidden_size()} dimensions, {base.name} "
            f"{base.shape.hidden_size}, and no pruning.json says which they are. To fix, distil "
            f"from the model that it was cut from, or set loss.distillation_alignment=0."
        )
    return torch.tensor(kept)


def build_algorithms(
    config: Config, model: ComposerBGEM3, train_loader: DataSpec, stop: StopOnSignal
) -> list[Algorithm]:
    """Build the algorithms, which change training.

    After a batch the trainer runs the last algorithm first: gradients are averaged, checked and
    clipped.
    """
    algorithms: list[Algorithm] = []
    if config.data.adapt_weights_interval is not None:
        loader, data = train_loader.dataloader, config.data
        sources = range(len(loader.dataset.names))
        probes = [build_probes(loader, data.adapt_batches, source) for source in sources]
        algorithms.append(SourceWeights(loader.dataset, probes, data.adapt_weights_interval))
    if model.l0_module is not None:
        warmup = config.model.l0_module.lagrangian_warmup_steps
        algorithms.append(PruningSchedule(model.l0_module, warmup))
    o = config.optimizer
    guard = NonFiniteGuard(stop.save_interval(config.save_interval), skip=o.non_finite == "skip")
    if o.max_grad_norm > 0:
        algorithms.append(GroupGradientClipping(o.max_grad_norm, guard))
    algorithms.append(guard)
    if config.parallelism.fsdp:
        algorithms.append(MeanGradients(sharding.measure_gradient_scale(config.device)))
    return [*algorithms, stop]


def build_callbacks(
    config: Config,
    model: ComposerBGEM3,
    metadata: RunMetadata,
    base: BaseModel,
    collections: Mapping[str, Task],
) -> list[Callback]:
    """Build the callbacks, which watch training."""
    callbacks: list[Callback] = [
        RunMetadataCallback(metadata),
        EmbeddingCallback(config.log_interval, model.special_ids),
        DataCallback(config.log_interval),
    ]
    if model.l0_module is not None:
        rates = {knob: getattr(config.optimizer, knob) for knob in ("l0_lr", "lagrangian_lr")}
        callbacks.append(PruningCallback(model.l0_module, config.log_interval))
        callbacks.append(PruningWarnings(model.l0_module, rates))
        if config.loggers.wandb is not None:
            callbacks.append(GateMapCallback(model.l0_module, config.eval_interval))
    if config.data.eval:
        e, folder = config.evaluation, Path(config.run_folder)
        evaluation = EvaluationCallback(
            base,
            collections,
            config.eval_interval,
            modes=e.modes,
            batch_size=config.eval_batch_size,
            max_length=e.max_length or config.model.max_length,
            best=None if e.keep_best is None else BestCheckpoint(e.keep_best, folder),
        )
        callbacks.append(evaluation)
    return callbacks


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Build the destinations of metrics."""
    loggers: list[LoggerDestination] = [MetricsFile(Path(config.run_folder) / "metrics.jsonl")]
    folder = Path(config.loggers.folder) / config.run_name
    if config.loggers.wandb is not None:
        w = config.loggers.wandb
        folder.mkdir(parents=True, exist_ok=True)
        init = {"mode": w.mode, "dir": str(folder)}
        loggers.append(
            WandBLogger(project=w.project, entity=w.entity, name=config.run_name, init_kwargs=init)
        )
    if config.loggers.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(folder)))
    if config.loggers.file:
        # Composer's logger empties an existing file: a resumed run gets a new one.
        number = len(list(folder.glob(f"{config.stage}*-rank0.txt"))) if config.autoresume else 0
        suffix = f"-{number}" if number else ""
        name = str(folder / f"{config.stage}{suffix}-rank{{rank}}.txt")
        loggers.append(FileLogger(filename=name, overwrite=True))
    return loggers


def _microbatch_size(config: Config) -> int:
    """Number of rows that the trainer gives the model at once."""
    whole = config.global_train_batch_size // dist.get_world_size()
    micro = config.device_train_microbatch_size
    # A loss over the batch needs all of it: the model itself splits it and caches gradients.
    return whole if micro is None or config.loss.compares_texts else micro


def build_trainer(
    config: Config,
    model: ComposerBGEM3,
    train_loader: DataSpec,
    evaluators: list[Evaluator],
    callbacks: list[Callback],
    stop: StopOnSignal,
) -> Trainer:
    """Build the Composer trainer of a run, at the checkpoint from which it resumes.

    The checkpoint is read without unpickling anything but plain values.
    """
    # This comes first: it puts the model on the device, where the optimizer finds it.
    parallelism = sharding.build_parallelism(config, model)
    targets = {} if model.l0_module is None else model.l0_module.final_targets()
    shows_bar = config.progress_bar and sys.stderr.isatty()
    # Progress lines are not on the console while there is a bar.
    progress = ProgressLog(config.log_interval, targets, on_console=not shows_bar)
    # Composer refuses bfloat16 on a CPU, where the model handles it.
    handled = config.precision == "amp_bf16" and torch_device(config.device) == "cpu"
    with allow_plain_types():
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            eval_dataloader=evaluators,
            max_duration=config.max_duration,
            optimizers=build_optimizer(config, model),
            schedulers=build_scheduler(config),
            step_schedulers_every_batch=True,
            algorithms=build_algorithms(config, model, train_loader, stop),
            callbacks=callbacks,
            loggers=[*build_loggers(config), progress],
            progress_bar=shows_bar,
            run_name=Path(config.run_folder).name,
            save_folder=config.run_folder,
            save_filename=CHECKPOINT,
            save_interval=stop.save_interval(config.save_interval),
            save_num_checkpoints_to_keep=config.checkpoints_to_keep,
            autoresume=config.autoresume,
            seed=config.seed,
            precision="fp32" if handled else config.precision,
            device=config.device,
            device_train_microbatch_size=_microbatch_size(config),
            parallelism_config=parallelism,
            dist_timeout=config.dist_timeout,
        )
    if model.row_tables():
        # Added here because it has no state, and older checkpoints do not name it.
        trainer.state.algorithms.append(RowGradients())
    sharding.register_forward_methods(model)
    return trainer
