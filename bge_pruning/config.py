"""Typed configuration: every key of the YAML files, with its default and its reason.

Files are merged left to right, then ``key=value`` overrides. A file may name files that it builds
on under ``extends`` (relative to itself). An unknown key, a wrong type or a value out of range is
an error that names the file, the line and the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# OmegaConf reads the annotations at run time and knows Optional[...] best.
# ruff: noqa: UP045


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, where and how to fix it."""


@dataclass
class TargetModelConfig:
    """Sizes to reach; a size that is left out stays as it is."""

    d_model: Optional[int] = None
    n_heads: Optional[int] = None
    n_layers: Optional[int] = None
    intermediate_size: Optional[int] = None
    vocab_size: Optional[int] = None


@dataclass
class L0ModuleConfig:
    """Gates and their constraint. Give exactly one of the three ``target_`` keys."""

    pruning_modules: list[str] = field(
        default_factory=lambda: ["head", "intermediate", "layer", "hidden"]
    )
    target_model: Optional[TargetModelConfig] = None
    target_parameters: Optional[float] = None  # encoder parameters, e.g. 181.4e6
    target_density: Optional[float] = None  # share of the encoder's parameters to keep, (0, 1]
    start_sparsity: float = 0.0  # target sparsity at step 0
    lagrangian_warmup_steps: str = "0.3dur"  # Composer time string: the target is reached here
    eval_target_model: bool = True  # evaluate the final shape; false: the expected shape so far
    init_mean: float = 3.0  # log_alpha at the start: open with probability 0.99
    init_std: float = 0.25  # without spread all gates would move alike


@dataclass
class ModelConfig:
    """The model to prune. Sizes are read from the checkpoint; those given here must agree."""

    name: str = "composer_bge_m3"
    base_model: str = "BAAI/bge-m3"  # hub name or folder
    revision: Optional[str] = None  # hub revision
    d_model: Optional[int] = None
    n_heads: Optional[int] = None
    n_layers: Optional[int] = None
    intermediate_size: Optional[int] = None
    vocab_size: Optional[int] = None
    pooling: Optional[str] = None  # cls or mean; default: what the base model's files say, or cls
    max_length: int = 512  # tokens; longer texts are truncated
    dropout: float = 0.0  # 0: the gates already are noise
    init_missing_heads: bool = False  # make sparse and multi-vector heads a base model lacks
    l0_module: Optional[L0ModuleConfig] = None  # null: ordinary training, nothing is pruned


@dataclass
class SourceConfig:
    """One file of data."""

    name: str = "???"
    kind: str = "???"  # sts: scored sentence pairs; sentences: text without labels
    path: str = "???"


@dataclass
class DataConfig:
    """Training and evaluation data."""

    train: list[SourceConfig] = field(default_factory=list)
    eval: list[SourceConfig] = field(default_factory=list)
    num_workers: int = 0  # texts are tokenised once, before training: workers have little to do
    processed_folder: str = "data/processed"  # cached teacher vectors


@dataclass
class LossConfig:
    """Weights of the parts of the loss; 0 leaves a part out."""

    sts_regression: float = 0.0
    distillation_alignment: float = 0.0
    distillation_similarity: float = 0.0
    similarity_temperature: float = 0.05


@dataclass
class TeacherConfig:
    """The model to distil from."""

    base_model: Optional[str] = None  # default: model.base_model, unpruned
    cache: bool = True  # embed the training texts once; false: run the teacher in every step


@dataclass
class OptimizerConfig:
    """AdamW with three learning rates."""

    lr: float = 1e-4  # weights
    weight_decay: float = 0.01  # matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    l0_lr: float = 0.1  # gates
    lagrangian_lr: float = 0.1  # multipliers, by ascent
    max_grad_norm: float = 1.0  # per group; 0 switches clipping off


@dataclass
class SchedulerConfig:
    """Learning-rate schedule of all groups."""

    name: str = "linear"  # linear, cosine or constant, after the warm-up
    t_warmup: str = "0.05dur"  # Composer time string
    alpha_f: float = 0.1  # last learning rate as a share of the first


@dataclass
class WandbConfig:
    """Weights & Biases; ``mode: offline`` needs no account."""

    project: str = "bge_pruning"
    entity: Optional[str] = None
    mode: str = "offline"


@dataclass
class LoggersConfig:
    """Where metrics go besides the console and the run's metrics.jsonl."""

    wandb: Optional[WandbConfig] = None
    tensorboard: bool = False
    file: bool = False
    folder: str = "experiments/logs"


@dataclass
class Config:
    """A run."""

    extends: list[str] = field(default_factory=list)
    run_name: str = "bge_pruning"
    stage: str = "prune"  # prune, or recover: train the extracted model on
    dry_run: bool = False  # print the plan and stop
    seed: int = 17
    max_duration: str = "15000ba"
    eval_interval: str = "500ba"
    save_interval: str = "500ba"
    log_interval: str = "50ba"
    global_train_batch_size: int = 32
    device_train_microbatch_size: Optional[int] = None  # default: the whole batch of a device
    eval_batch_size: int = 64
    precision: str = "fp32"  # fp32, or amp_bf16 on a GPU
    device: Optional[str] = None  # cpu or gpu; default: a GPU if there is one
    run_folder: str = "experiments/checkpoints/${run_name}"
    results_folder: str = "experiments/results/${run_name}"
    autoresume: bool = False
    overwrite: bool = False  # replace an earlier run's folders
    progress_bar: bool = True
    checkpoints_to_keep: int = 2
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    # Keys that differ while the extracted model is trained on, in the layout of this class.
    recovery: Optional[dict[str, Any]] = None


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a run's configuration.

    Args:
        paths: YAML files, merged left to right, each after the files it ``extends``.
        overrides: ``key=value`` strings, applied last.

    Returns:
        The typed configuration. With ``stage: recover`` the ``recovery`` keys are merged in.

    Raises:
        ConfigError: If a file cannot be read, or a key or value is wrong.
    """
    merged = OmegaConf.structured(Config)
    for path in paths:
        for file in _with_bases(Path(path), ()):
            merged = _merge(merged, _read_yaml(file), str(file), file)
    for override in overrides:
        merged = _merge(merged, _parse_override(override), f"override '{override}'", None)
    merged.extends = []
    recovering = _merge(merged, OmegaConf.create(merged.recovery or {}), "recovery", None)
    _check(_to_object(recovering))
    config = _to_object(recovering if merged.stage == "recover" else merged)
    if config.stage == "recover":
        _make_recovery(config)
    _check(config)
    return config


def _make_recovery(config: Config) -> None:
    """Turn the configuration of a pruning run into that of its recovery, in place.

    The model is the extracted one, without gates, and its teacher is the model it came from; its
    sizes are no longer those that the YAML names.
    """
    config.model.base_model = str(pruned_model_folder(config))
    config.model.revision = None
    config.model.l0_module = None
    for size in ("d_model", "n_heads", "n_layers", "intermediate_size", "vocab_size"):
        setattr(config.model, size, None)
    config.run_folder = f"{config.run_folder}-recovery"


def pruned_model_folder(config: Config) -> Path:
    """Where the model extracted from a pruning run lies."""
    return Path(config.results_folder) / "pruned_model"


def to_yaml(config: Config) -> str:
    """The configuration as YAML, every key written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """The configuration that :func:`to_yaml` wrote."""
    return _to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))


def _with_bases(path: Path, seen: tuple[Path, ...]) -> list[Path]:
    """The files a YAML builds on, then itself."""
    if path in seen:
        raise ConfigError(
            f"{path}: extends itself through {', '.join(map(str, seen))}. To fix, break the circle."
        )
    bases = _read_yaml(path).get("extends") or []
    if isinstance(bases, str):
        bases = [bases]
    files = [f for base in bases for f in _with_bases(path.parent / base, (*seen, path))]
    return [*files, path]


def _read_yaml(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. To fix, check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{path}: must hold 'key: value' pairs. To fix, see configs/.")
    if isinstance(content.get("extends"), str):
        content.extends = [content.extends]
    return content


def _parse_override(text: str) -> DictConfig:
    key, separator, _ = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override '{text}' is not 'key=value'. To fix, write e.g. seed=1.")
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override '{text}' cannot be read: {error}") from None


def _merge(base: DictConfig, extra: DictConfig, source: str, path: Path | None) -> DictConfig:
    _check_keys(Config, OmegaConf.to_container(extra, resolve=False), (), source, path)
    try:
        return OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        line = _line_of(path, tuple(key.split("."))) if path else None
        raise ConfigError(
            f"{source}{f':{line}' if line else ''}: {key}: {str(error).splitlines()[0]} "
            f"To fix, see this key in bge_pruning/config.py."
        ) from None


def _check_keys(
    schema: type, content: Any, parents: tuple[str, ...], source: str, path: Path | None
) -> None:
    """Refuse keys that the schema lacks, with the nearest one that it has."""
    if not isinstance(content, dict):
        return
    known = {f.name for f in fields(schema)}
    hints = get_type_hints(schema)
    for key, value in content.items():
        full_key = (*parents, str(key))
        if key not in known:
            line = _line_of(path, full_key) if path else None
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}."
            raise ConfigError(
                f"{source}{f':{line}' if line else ''}: unknown key '{'.'.join(full_key)}': {fix}"
            )
        nested = _dataclass_of(hints[key])
        for item in value if isinstance(value, list) else [value]:
            if nested is not None:
                _check_keys(nested, item, full_key, source, path)


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in ``X``, ``Optional[X]`` or ``list[X]``."""
    return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def _line_of(path: Path, key: tuple[str, ...]) -> int | None:
    """Line of a (nested) key in a YAML file, from 1."""
    node = yaml.compose(path.read_text(encoding="utf-8"))
    line = None
    for part in key:
        if isinstance(node, yaml.SequenceNode):
            node = next((n for n in node.value if part in [k.value for k, _ in n.value]), None)
        if not isinstance(node, yaml.MappingNode):
            return line
        pair = next(((k, v) for k, v in node.value if k.value == part), None)
        if pair is None:
            return line
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def _to_object(config: DictConfig) -> Config:
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key}: {str(error).splitlines()[0]} To fix, give the key a value."
        ) from None


def _check(config: Config) -> None:
    """Refuse values that are out of range whatever the model is."""
    o, s, m, loss = config.optimizer, config.scheduler, config.model, config.loss
    choices = {
        "stage": (config.stage, ("prune", "recover")),
        "scheduler.name": (s.name, ("linear", "cosine", "constant")),
        "precision": (config.precision, ("fp32", "amp_bf16", "amp_fp16")),
        "device": (config.device, (None, "cpu", "gpu")),
        "model.pooling": (m.pooling, (None, "cls", "mean")),
    }
    for index, source in enumerate([*config.data.train, *config.data.eval]):
        choices[f"kind of data source {index} ('{source.name}')"] = (source.kind, SOURCE_KINDS)
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{key} '{value}' is not one of {allowed}. To fix, choose one.")
    positive = {
        "global_train_batch_size": config.global_train_batch_size,
        "eval_batch_size": config.eval_batch_size,
        "checkpoints_to_keep": config.checkpoints_to_keep,
        "model.max_length": m.max_length,
        "optimizer.eps": o.eps,
        "loss.similarity_temperature": loss.similarity_temperature,
    }
    if config.device_train_microbatch_size is not None:
        positive["device_train_microbatch_size"] = config.device_train_microbatch_size
    not_negative = {
        "seed": config.seed,
        "data.num_workers": config.data.num_workers,
        **{f"optimizer.{k}": v for k, v in vars(o).items() if isinstance(v, (int, float))},
        **{f"loss.{k}": v for k, v in vars(loss).items()},
    }
    unit = {"model.dropout": m.dropout, "scheduler.alpha_f": s.alpha_f}
    if m.l0_module is not None:
        unit["model.l0_module.start_sparsity"] = m.l0_module.start_sparsity
        _check_target(m.l0_module)
    _check_range(positive, lambda v: v > 0, "above 0")
    _check_range(not_negative, lambda v: v >= 0, "0 or more")
    _check_range(unit, lambda v: 0 <= v <= 1, "in [0, 1]")


SOURCE_KINDS = ("sts", "sentences", "contrastive", "mteb")


def _check_range(values: dict[str, float], holds: Any, expected: str) -> None:
    for key, value in values.items():
        if not holds(value):
            raise ConfigError(f"{key} {value} is not {expected}. To fix, set {key} {expected}.")


def _check_target(l0: L0ModuleConfig) -> None:
    keys = ("target_model", "target_parameters", "target_density")
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
