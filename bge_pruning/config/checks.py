"""What can be refused of a configuration whatever the model is."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bge_pruning.config.schema import (
    METHODS,
    SOURCE_KINDS,
    Config,
    ConfigError,
    ExportConfig,
    L0ModuleConfig,
    SourceConfig,
    missing_export_options,
)

# More is a slip of the keyboard, and more than a 64-bit integer would be an error of C code.
LARGEST = 1e15
MAX_NAME = 200
MAX_WORKERS = 256


def check(config: Config) -> None:
    """Refuse values that are out of range whatever the model is."""
    _check_values(config, "")
    _check_run_name(config.run_name)
    for source in [*config.data.train, *config.data.eval]:
        _check_source(source)
    for key, (value, allowed) in _choices(config).items():
        if value not in allowed:
            raise ConfigError(f"{key} '{value}' is not one of {allowed}. To fix, choose one.")
    _check_export(config.export)
    _check_parallelism(config)
    _check_limits(config)
    if config.model.l0_module is not None:
        _check_target(config.model.l0_module)
    _check_times(config)
    _check_ranges(config)


def _choices(config: Config) -> dict[str, tuple[Any, tuple]]:
    """Values of which there are a few, and what they may be, by key."""
    choices = {
        "method": (config.method, METHODS),
        "stage": (config.stage, ("prune", "recover")),
        "baseline.layer_choice": (config.baseline.layer_choice, ("best", "every_nth")),
        "optimizer.non_finite": (config.optimizer.non_finite, ("stop", "skip")),
        "scheduler.name": (config.scheduler.name, ("linear", "cosine", "constant")),
        "precision": (config.precision, ("fp32", "amp_bf16", "amp_fp16")),
        "device": (config.device, (None, "cpu", "gpu")),
        "model.pooling": (config.model.pooling, (None, "cls", "mean")),
        "data.on_bad_row": (config.data.on_bad_row, ("error", "skip")),
        "parallelism.sharding": (config.parallelism.sharding, ("full", "gradients")),
        "parallelism.state_dict": (config.parallelism.state_dict, ("full", "sharded")),
        "export.dtype": (config.export.dtype, ("fp32", "fp16", "bf16")),
        "export.colbert_dim": (config.export.colbert_dim, ("keep", "hidden")),
    }
    if config.model.l0_module is not None:
        orders = ("random", "activation", "reconstruction")
        choices["model.l0_module.init_order"] = (config.model.l0_module.init_order, orders)
    if config.loggers.wandb is not None:
        modes = ("offline", "online", "disabled")
        choices["loggers.wandb.mode"] = (config.loggers.wandb.mode, modes)
    for index, source in enumerate([*config.data.train, *config.data.eval]):
        choices[f"kind of data source {index} ('{source.name}')"] = (source.kind, SOURCE_KINDS)
    for index, output in enumerate(config.loss.contrastive_outputs):
        choices[f"loss.contrastive_outputs[{index}]"] = (output, ("dense", "sparse", "colbert"))
    return choices


def _check_ranges(config: Config) -> None:
    """Refuse numbers that are too small or too large."""
    o, m, loss = config.optimizer, config.model, config.loss
    positive = {
        "global_train_batch_size": config.global_train_batch_size,
        "device_train_microbatch_size": config.device_train_microbatch_size,
        "eval_batch_size": config.eval_batch_size,
        "checkpoints_to_keep": config.checkpoints_to_keep,
        "dist_timeout": config.dist_timeout,
        "model.max_length": m.max_length,
        "evaluation.max_length": config.evaluation.max_length,
        "optimizer.eps": o.eps,
        "loss.similarity_temperature": loss.similarity_temperature,
        "loss.temperature": loss.temperature,
        "data.adapt_batches": config.data.adapt_batches,
        "baseline.calibration_texts": config.baseline.calibration_texts,
    }
    not_negative = {
        "seed": config.seed,
        "data.num_workers": config.data.num_workers,
        "data.negatives": config.data.negatives,
        "teacher.refit_texts": config.teacher.refit_texts,
        **{f"optimizer.{k}": v for k, v in vars(o).items() if isinstance(v, (int, float))},
        **{f"loss.{k}": v for k, v in vars(loss).items() if type(v) is float},
    }
    unit = {"model.dropout": m.dropout, "scheduler.alpha_f": config.scheduler.alpha_f}
    if m.l0_module is not None:
        unit["model.l0_module.start_sparsity"] = m.l0_module.start_sparsity
        not_negative["model.l0_module.binarization"] = m.l0_module.binarization
    given = {key: value for key, value in positive.items() if value is not None}
    _check_range(given, lambda v: v > 0, "above 0")
    _check_range(not_negative, lambda v: v >= 0, "0 or more")
    _check_range(unit, lambda v: 0 <= v <= 1, "in [0, 1]")


def _check_limits(config: Config) -> None:
    """What a library would refuse later in words of its own."""
    paths = {"run_folder": config.run_folder, "loggers.folder": config.loggers.folder}
    for key, path in {"run_name": config.run_name, **paths}.items():
        if {"{", "}"} & set(path):  # Composer formats them, with {rank} for one
            raise ConfigError(
                f"{key} '{path[:200]}' holds a brace, which stands for a placeholder. To fix, "
                f"write it without."
            )
    betas = config.optimizer.betas
    if config.seed >= 2**32:
        raise ConfigError(f"seed {config.seed} is not below 2^32. To fix, use e.g. 17.")
    if config.data.num_workers > MAX_WORKERS:
        raise ConfigError(
            f"data.num_workers {config.data.num_workers} is above {MAX_WORKERS} processes. To fix, "
            f"use a few, or 0."
        )
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(
            f"optimizer.betas {betas} are not two numbers in [0, 1). To fix, write e.g. [0.9, "
            f"0.98]."
        )


def _check_values(part: Any, key: str) -> None:
    """Refuse numbers and texts that no key can mean: they would fail far from the file."""
    if is_dataclass(part):
        hints = get_type_hints(type(part))
        for field in fields(part):
            value, name = getattr(part, field.name), f"{key}.{field.name}" if key else field.name
            if field.name != "recovery":  # checked where it is merged in
                _check_items(value, hints[field.name], name)
            _check_values(value, name)
    elif isinstance(part, list | dict):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        for name, value in items:
            _check_values(value, f"{key}[{name}]")
    elif isinstance(part, int | float) and not abs(part) < LARGEST:  # NaN is not below it
        raise ConfigError(
            f"{key} {_shorten(part)} is not a finite number below {LARGEST:.0e}. To fix, write a "
            f"smaller one."
        )
    elif isinstance(part, str) and "\0" in part:
        raise ConfigError(f"{key} {_shorten(part)} holds a null byte. To fix, remove it.")


def _check_items(value: Any, hint: Any, key: str) -> None:
    """Refuse items of a list of another kind; OmegaConf lets null and lists through."""
    kinds = {str: ((str,), "texts"), float: ((int, float), "numbers")}
    if isinstance(value, list | dict) and (kind := kinds.get(get_args(hint)[-1])):
        items = value.values() if isinstance(value, dict) else value
        if any(type(item) not in kind[0] for item in items):
            raise ConfigError(
                f"{key} {_shorten(value)} does not hold {kind[1]} alone. To fix, write {kind[1]}."
            )


def _shorten(value: Any) -> str:
    huge = isinstance(value, int) and abs(value) >= LARGEST  # perhaps of thousands of digits
    return "of many digits" if huge else repr(value)[:60]


def _check_run_name(name: str) -> None:
    """It becomes a part of paths, with a suffix such as -recovery, and must not leave them."""
    inside = Path(name).name == name and name not in (".", "..")
    if not inside or not name.strip() or len(name.encode()) > MAX_NAME:
        raise ConfigError(
            f"run_name '{name[:60]}' is not the name of a folder, of 1 to {MAX_NAME} bytes and "
            f"without '/'. To fix, write a name; run_folder and results_folder say where."
        )


def _check_export(export: ExportConfig) -> None:
    if export.vocabulary_size is not None:
        size = {"export.vocabulary_size": export.vocabulary_size}
        _check_range(size, lambda v: v > 0, "above 0")
    for option, needed in missing_export_options(vars(export)).items():
        names = " or ".join(f"export.{name}" for name in needed)
        raise ConfigError(f"export.{option} needs {names}. To fix, set that, or leave it out.")


def _check_parallelism(config: Config) -> None:
    """Refuse what a sharded run cannot do."""
    p = config.parallelism
    if p.state_dict == "sharded" and not p.fsdp:
        raise ConfigError(
            "parallelism.state_dict=sharded needs a sharded model. To fix, set "
            "parallelism.fsdp=true, or state_dict=full."
        )
    if p.state_dict == "sharded" and config.evaluation.keep_best is not None:
        raise ConfigError(
            "evaluation.keep_best writes one file, which parallelism.state_dict=sharded does not. "
            "To fix, set state_dict=full, or keep_best=null."
        )
    refused = {
        "model.compile=true": config.model.compile,
        "precision=amp_fp16": config.precision == "amp_fp16",
    }
    for setting, given in refused.items():
        if p.fsdp and given:
            raise ConfigError(
                f"parallelism.fsdp does not work with {setting}. To fix, leave one of them out."
            )


def _check_source(source: SourceConfig) -> None:
    """Refuse values of a source that are out of range."""
    where = f"of data source '{source.name}'"
    low, high = source.score_range if len(source.score_range) == 2 else (0.0, 0.0)
    if not -float("inf") < low < high < float("inf"):
        raise ConfigError(
            f"score_range {source.score_range} {where} is not [lowest, highest]. To fix, write "
            f"e.g. [0, 5]."
        )
    if Path(source.split).name != source.split:
        raise ConfigError(
            f"split '{source.split}' {where} is not the name of a split. To fix, write e.g. train."
        )
    not_negative = {f"mined_negatives {where}": source.mined_negatives}
    if source.negatives is not None:
        not_negative[f"negatives {where}"] = source.negatives
    if source.weight is not None:
        _check_range(
            {f"weight {where}": source.weight}, lambda v: 0 < v < float("inf"), "above 0 and finite"
        )
    if source.replaced_tokens and source.kind != "sentences":
        raise ConfigError(
            f"replaced_tokens {where} is not for kind {source.kind}: its texts would no longer "
            f"mean what their scores or queries say. To fix, name the file again as a source of "
            f"kind sentences."
        )
    margin = {f"mining_margin {where}": source.mining_margin}
    replaced = {f"replaced_tokens {where}": source.replaced_tokens}
    _check_range(replaced, lambda v: 0 <= v <= 1, "in [0, 1]")
    _check_range(not_negative, lambda v: v >= 0, "0 or more")
    _check_range(margin, lambda v: 0 < v <= 1, "in (0, 1]")


def _check_times(config: Config) -> None:
    """Refuse what Composer could not read as a time, before it is asked to."""
    counts, shares = ("ba", "ep"), ("ba", "ep", "dur")
    times = {
        "max_duration": (config.max_duration, counts),
        "eval_interval": (config.eval_interval, shares),
        "save_interval": (config.save_interval, shares),
        "log_interval": (config.log_interval, counts),
        "scheduler.t_warmup": (config.scheduler.t_warmup, shares),
    }
    if config.data.adapt_weights_interval is not None:
        times["data.adapt_weights_interval"] = (config.data.adapt_weights_interval, shares)
    if (l0 := config.model.l0_module) is not None:
        times["model.l0_module.lagrangian_warmup_steps"] = (l0.lagrangian_warmup_steps, shares)
    for key, (text, units) in times.items():
        found = re.fullmatch(r"([0-9]{1,9}|0?\.[0-9]+|[01]\.[0-9]*)(ba|ep|dur)", text)
        whole = found is not None and (found[2] == "dur" or found[1].isdigit())
        if not whole or found[2] not in units:
            examples = {"ba": "500ba (batches)", "ep": "2ep (epochs)", "dur": "0.1dur (of the run)"}
            raise ConfigError(
                f"{key} '{text}' is not a time, expected a number and a unit such as "
                f"{', '.join(examples[unit] for unit in units)}. To fix, write one of these forms."
            )
        if float(found[1]) == 0 and "warmup" not in key:
            raise ConfigError(f"{key} '{text}' is not above 0. To fix, write e.g. 500ba.")


def _check_range(values: dict[str, float], holds: Any, expected: str) -> None:
    for key, value in values.items():
        if not holds(value):
            raise ConfigError(f"{key} {value} is not {expected}. To fix, set {key} {expected}.")


def _check_target(l0: L0ModuleConfig) -> None:
    keys = ("target_model", "target_parameters", "target_density", "target_speedup")
    given = [key for key in keys if getattr(l0, key) is not None]
    if len(given) != 1:
        raise ConfigError(
            f"model.l0_module needs exactly one of {', '.join(keys)}, not "
            f"{len(given)} ({', '.join(given) or 'none'}). To fix, set the others to null."
        )
    if l0.target_density is not None and not 0 < l0.target_density <= 1:
        raise ConfigError(
            f"model.l0_module.target_density {l0.target_density} is not in (0, 1]: it is the share "
            f"of encoder parameters to keep. To fix, write e.g. 0.6."
        )
    if l0.target_speedup is not None and not 1 < l0.target_speedup < float("inf"):
        raise ConfigError(
            f"model.l0_module.target_speedup {l0.target_speedup} is not above 1: it says how many "
            f"times fewer operations are wanted. To fix, write e.g. 2."
        )
    if l0.target_length < 1:
        raise ConfigError(
            f"model.l0_module.target_length {l0.target_length} is not above 0: it is a number of "
            f"tokens. To fix, write e.g. 512."
        )
