"""Checks of what a command does with a configuration: losses, data, evaluation, methods.

All of them raise a :class:`ConfigError` that says what does not fit and how to fix it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bge_pruning.config import names
from bge_pruning.config.data_checks import check_mixtures
from bge_pruning.config.names import COLLECTIONS, EVALUATED_KINDS, L0, WITH_PASSAGES
from bge_pruning.config.schema import Config, ConfigError, SourceConfig

# Kinds of data that a loss needs. The other distillation works with all of them.
LOSS_NEEDS = {
    "sts_regression": ("sts",),
    "cosent": ("sts",),
    "contrastive": WITH_PASSAGES,
    "self_distillation": WITH_PASSAGES,
    "score_distillation": WITH_PASSAGES,
    "distillation_scores": WITH_PASSAGES,
}
EXAMPLE = "add a target, e.g. configs/bge_m3/target_60pct.yaml"


def check_training(config: Config, device: str) -> None:
    """Refuse a stage that cannot be trained on a torch device."""
    if config.method != L0 and config.model.l0_module is not None:
        raise ConfigError(
            f"method '{config.method}' trains no gates. To fix, run scripts/run_pipeline.py, "
            f"or this with stage=recover after scripts/run_pipeline.py --only cut."
        )
    if config.precision == "amp_fp16" and device == "cpu":
        raise ConfigError(
            "precision amp_fp16 needs a GPU: float16 gradients are scaled there alone. To fix, set "
            "precision to fp32 or amp_bf16."
        )
    check_objective(config)


def check_objective(config: Config) -> None:
    """Refuse losses, data, evaluations and batches that are missing or do not fit each other."""
    if not config.data.train:
        raise ConfigError("data.train is empty. To fix, add configs/training/sts_only.yaml.")
    _check_sources(config)
    _check_adaptive_weights(config)
    check_mixtures(config)
    if config.loss.distillation_hidden and config.teacher.cache is True:
        raise ConfigError(
            "loss.distillation_hidden needs the teacher's hidden states, which are too many to "
            "cache. To fix, leave teacher.cache out, or set it to false."
        )
    if config.model.freeze_encoder:
        _check_frozen(config)
    _check_losses(config)
    for source in config.data.train:
        _check_negatives(source, config)
    _check_evaluation(config)
    # Cached gradients embed a piece again in the backward pass, when its weights are not there.
    in_pieces = config.device_train_microbatch_size is not None
    if config.parallelism.fsdp and in_pieces and config.loss.compares_texts:
        raise ConfigError(
            "parallelism.fsdp does not work with device_train_microbatch_size where the loss "
            "compares the texts of a batch. To fix, leave it out and set "
            "model.activation_checkpointing=true, which needs less memory too."
        )


def check_checkpoint_kind(config: Config, checkpoint: Path | None) -> None:
    """Refuse to resume from a file where the run would write a folder, or the other way round."""
    if checkpoint is None:
        return
    kind = "sharded" if checkpoint.is_dir() else "full"
    if kind != config.parallelism.state_dict:
        also = " and parallelism.fsdp=true" if kind == "sharded" else ""
        raise ConfigError(
            f"{checkpoint} is a {kind} checkpoint, and the configuration says "
            f"{config.parallelism.state_dict}. To fix, set parallelism.state_dict={kind}{also}."
        )


def _check_sources(config: Config) -> None:
    """Check names, weights and columns of the sources, and the folder of the processed data."""
    train, evaluated = config.data.train, config.data.eval
    for part, sources in (("train", train), ("eval", evaluated)):
        given = [source.name for source in sources]
        if repeated := sorted({name for name in given if given.count(name) > 1}):
            raise ConfigError(
                f"two sources of data.{part} are called {', '.join(repeated)}. To fix, rename one."
            )
    weighted = [source.name for source in train if source.weight is not None]
    if weighted and len(weighted) < len(train):
        raise ConfigError(
            f"only {', '.join(weighted)} of data.train have a weight. To fix, give one to every "
            f"source, or to none."
        )
    _check_streams(config)
    for source in [*train, *evaluated]:
        known = names.SOURCE_COLUMNS.get(source.kind, ())
        if unknown := sorted(set(source.columns) - set(known)):
            raise ConfigError(
                f"columns of data source '{source.name}' names {', '.join(unknown)}; kind "
                f"{source.kind} has {', '.join(known) or 'none to rename'}. To fix, write our name "
                f"first and the file's second."
            )
    processed = Path(config.data.processed_folder)
    if processed.exists() and not processed.is_dir():
        raise ConfigError(
            f"data.processed_folder {processed} is a file. To fix, name a folder, or remove it."
        )


def _check_streams(config: Config) -> None:
    """Refuse a stream of which nobody knows how many rows the run needs."""
    if held_out := [source.name for source in config.data.eval if source.streaming]:
        raise ConfigError(
            f"{', '.join(held_out)} of data.eval is streaming, and evaluation reads all rows. To "
            f"fix, remove it, or set rows instead."
        )
    train = config.data.train
    for source in (source for source in train if source.streaming and source.rows is None):
        if len(train) > 1 and source.weight is None:
            raise ConfigError(
                f"data source '{source.name}' is a stream without weight and rows, so nobody knows "
                f"how much of it the run needs. To fix, give every source a weight, or set rows."
            )
        if not config.max_duration.endswith("ba"):
            raise ConfigError(
                f"data source '{source.name}' is a stream, which has no end, and max_duration is "
                f"{config.max_duration}. To fix, give it in ba (batches), or set rows."
            )


def _check_adaptive_weights(config: Config) -> None:
    if config.data.adapt_weights_interval is None:
        return
    if config.data.num_workers:
        raise ConfigError(
            "data.adapt_weights_interval needs data.num_workers=0: workers load batches before the "
            "weights are known. To fix, set one of the two."
        )
    if config.model.l0_module is None:
        raise ConfigError(
            "data.adapt_weights_interval follows what pruning costs, and nothing is pruned "
            "(model.l0_module is null). To fix, leave it out."
        )


def _check_losses(config: Config) -> None:
    """Refuse a loss without data that it needs, and a source without a loss."""
    loss, sources = config.loss, config.data.train
    given = {name: kinds for name, kinds in LOSS_NEEDS.items() if getattr(loss, name)}
    if not loss.distils and not given:
        raise ConfigError("all weights under loss are 0. To fix, set e.g. loss.sts_regression=1.")
    for name, kinds in given.items():
        if not any(source.kind in kinds for source in sources):
            raise ConfigError(
                f"loss.{name} needs data.train of kind {' or '.join(kinds)}. To fix, set it to 0 "
                f"or add such data."
            )
    if loss.distillation_scores and not any(_teacher_compares(s, config) for s in sources):
        raise ConfigError(
            "loss.distillation_scores compares the passages of a query, and each has one: no "
            "data source has negatives. To fix, set negatives of a source above 0, and "
            "mined_negatives or perturbed_negatives if its rows have none, or "
            "loss.teacher_scores_in_batch=true."
        )
    for source in sources:
        if not _losses_of(source, config):
            raise ConfigError(
                f"no loss applies to data source '{source.name}' of kind {source.kind}. To fix, "
                f"set a weight under loss that does, or remove the source."
            )
    if loss.self_distillation and set(loss.contrastive_outputs) <= {"dense"}:
        raise ConfigError(
            "loss.self_distillation needs an ensemble of two outputs or more. To fix, add sparse "
            "or colbert to loss.contrastive_outputs, or set it to 0."
        )


def _teacher_compares(source: SourceConfig, config: Config) -> bool:
    """Whether the teacher can score two passages or more of a query."""
    several = config.loss.teacher_scores_in_batch or config.data.negatives_of(source) > 0
    return source.has_passages and several


def _losses_of(source: SourceConfig, config: Config) -> list[str]:
    """Parts of the loss that apply to a source."""
    parts = [name for name, value in vars(config.loss).items() if value]
    of_all = [n for n in parts if n.startswith("distillation_") and n != "distillation_scores"]
    of_kind = [name for name in parts if source.kind in LOSS_NEEDS.get(name, ())]
    if "distillation_scores" in of_kind and not _teacher_compares(source, config):
        of_kind.remove("distillation_scores")
    return of_all + of_kind


def _check_frozen(config: Config) -> None:
    """Refuse what has nothing to train, or no use, beside an encoder that is frozen."""
    model, loss = config.model, config.loss
    for name, given in (
        ("model.l0_module", model.l0_module is not None),
        ("model.dropout", model.dropout > 0),
        ("parallelism.fsdp", config.parallelism.fsdp),
        ("teacher.base_model", config.teacher.base_model is not None),
        ("a distillation under loss", loss.distils),
        ("teacher.refit_texts", config.stage == "recover" and config.teacher.refit_texts > 0),
    ):
        if given:
            raise ConfigError(
                f"model.freeze_encoder trains the heads on queries with passages, and has no use "
                f"for {name}. To fix, leave it out, or set model.freeze_encoder=false."
            )
    for source in config.data.train:
        if not source.has_passages:
            raise ConfigError(
                f"data source '{source.name}' is of kind {source.kind}: heads are trained on "
                f"queries with passages. To fix, remove it, or name data of kind "
                f"{' or '.join(WITH_PASSAGES)}."
            )
    if set(loss.contrastive_outputs) <= {"dense"}:
        raise ConfigError(
            "loss.contrastive_outputs names no head to train: a frozen encoder's dense vectors "
            "stay as they are. To fix, add sparse or colbert."
        )


def check_heads(config: Config) -> None:
    """Refuse what heads cannot be trained and judged with."""
    if config.model.l0_module is not None:
        raise ConfigError(
            "model.l0_module prunes, and heads are trained for a whole model. To fix, set it to "
            "null, and prune the model that is written."
        )
    untrained = {"sparse", "colbert"} - set(config.loss.contrastive_outputs)
    if config.model.replace_heads and untrained:
        raise ConfigError(
            f"model.replace_heads makes both heads new, and loss.contrastive_outputs lacks "
            f"{' and '.join(sorted(untrained))}. To fix, add it, or remove one .pt file from a "
            f"copy of the model instead."
        )
    if config.evaluation.keep_best is not None:
        raise ConfigError(
            "evaluation.keep_best keeps a checkpoint of a run that is evaluated while it trains; "
            "heads are evaluated before and after. To fix, leave it out."
        )
    for source in config.data.eval:
        if not source.is_collection:
            raise ConfigError(
                f"data.eval '{source.name}' is of kind {source.kind}; heads are judged by "
                f"retrieval. To fix, name data of kind {' or '.join(COLLECTIONS)}."
            )


def _check_negatives(source: SourceConfig, config: Config) -> None:
    if not source.has_passages:
        made = source.mined_negatives or source.perturbed_negatives
        if made or source.negatives or not source.in_batch_negatives:
            raise ConfigError(
                f"negatives of data source '{source.name}' need queries with passages, not kind "
                f"{source.kind}. To fix, remove negatives, mined_negatives, perturbed_negatives "
                f"and in_batch_negatives."
            )
        return
    used = config.data.negatives_of(source)
    for verb, count in (("mines", source.mined_negatives), ("makes", source.perturbed_negatives)):
        if count and not used:
            raise ConfigError(
                f"data source '{source.name}' {verb} {count} negatives a query and uses none. To "
                f"fix, set negatives of the source to 1 or more."
            )
    if not source.in_batch_negatives and not used:
        raise ConfigError(
            f"data source '{source.name}' has no negatives at all: in_batch_negatives is false and "
            f"negatives 0. To fix, set negatives of the source to 1 or more."
        )
    if config.loss.score_distillation and not used:
        raise ConfigError(
            f"loss.score_distillation compares the passages of a row, and data source "
            f"'{source.name}' has 1 without negatives. To fix, set negatives above 0."
        )


def _check_evaluation(config: Config) -> None:
    """Refuse data that cannot be evaluated, and a best checkpoint by a score that is not logged."""
    for source in config.data.eval:
        if source.kind not in EVALUATED_KINDS:
            raise ConfigError(
                f"data.eval '{source.name}' is of kind {source.kind}; {', '.join(EVALUATED_KINDS)} "
                f"can be evaluated. To fix, remove it."
            )
    evaluation, l0 = config.evaluation, config.model.l0_module
    if not evaluation.modes:
        raise ConfigError("evaluation.modes is empty. To fix, write e.g. [dense].")
    if evaluation.keep_best is None:
        return
    pairs = [source.name for source in config.data.eval if not source.is_collection]
    collections = [source.name for source in config.data.eval if source.is_collection]
    keys = names.list_metric_keys(pairs, collections, evaluation.modes)
    if evaluation.keep_best not in keys:
        raise ConfigError(
            f"evaluation.keep_best '{evaluation.keep_best}' is not evaluated. To fix, choose one "
            f"of {', '.join(keys) or 'the scores of data.eval, which is empty'}."
        )
    if l0 is not None and not l0.eval_target_model:
        raise ConfigError(
            "evaluation.keep_best would keep the model before anything is pruned: with "
            "model.l0_module.eval_target_model=false it is evaluated as large as it still is. To "
            "fix, set eval_target_model=true, or keep_best=null."
        )


def check_baseline(config: Config) -> None:
    """Refuse what cannot be cut without gates."""
    l0 = config.model.l0_module
    if config.method == L0 or l0 is None:
        raise ConfigError(
            f"method '{config.method}' with {'a' if l0 else 'no'} target is no baseline. To fix, "
            f"set method to layers, magnitude, activation, reconstruction or random, and "
            f"model.l0_module to a target."
        )
    check_objective(config)
    counts_layers = config.method == "layers" and l0.target_speedup is None
    if l0.target_model is None and not counts_layers:
        raise ConfigError(
            f"method '{config.method}' needs a target shape: only gates choose one for a budget. "
            f"To fix, set model.l0_module.target_model, and the other targets to null; "
            f"scripts/choose_shape.py finds a shape."
        )


def check_pipeline(config: Config, recovery: Config) -> None:
    """Refuse a run, as it prunes and as it recovers, that the pipeline cannot run through."""
    _require_target(config, "there is nothing to prune", EXAMPLE)
    _refuse_dry_run(config, "the pipeline is more than one")
    check_objective(recovery)


def check_family(config: Config, recovery: Config) -> None:
    """Refuse a run, as it prunes and as it recovers, that no family of sizes can be cut from."""
    _require_target(config, "there are no gates to cut sizes from", EXAMPLE)
    if config.method != L0:
        raise ConfigError(
            f"method '{config.method}' has no gates to cut sizes from. To fix, set method=l0, or "
            f"run scripts/run_pipeline.py once for each size."
        )
    _refuse_dry_run(config, "a family is several")
    check_objective(config)
    check_objective(recovery)


def check_cells(cells: Sequence[tuple[str, Config, Config]]) -> None:
    """Refuse cells of a study that cannot be run, or whose results cannot be compared.

    A cell is its name and the configurations of its pruning and its recovery.
    """
    originals = {}
    for name, config, recovery in cells:
        fix = "give the sizes of the study a target"
        _require_target(config, "there is nothing to prune", fix, f"{name}: ")
        check_objective(recovery)
        originals[config.model.base_model] = name
    if len(originals) > 1:
        raise ConfigError(
            f"the cells prune different models: {', '.join(originals)}. To fix, make a study for "
            f"each of them."
        )


def check_search(config: Config) -> None:
    """Refuse what no shape can be chosen for."""
    if config.stage == "recover":
        raise ConfigError(
            "stage is recover, whose model is cut already. To fix, leave stage out: shapes are "
            "chosen before pruning."
        )
    fix = "set e.g. model.l0_module.target_density=0.6"
    _require_target(config, "there is no size to choose a shape for", fix)
    if not config.data.train:
        raise ConfigError(
            "data.train is empty: shapes are fitted to and judged on its texts. To fix, add texts "
            "like those that will be embedded."
        )


def _require_target(config: Config, reason: str, fix: str, where: str = "") -> None:
    if config.model.l0_module is None:
        raise ConfigError(f"{where}model.l0_module is null: {reason}. To fix, {fix}.")


def _refuse_dry_run(config: Config, reason: str) -> None:
    if config.dry_run:
        raise ConfigError(
            f"dry_run=true prints the plan of a training, and {reason}. To fix, run "
            f"scripts/train_pruning.py with the same arguments."
        )
