"""Plan a run: source and target shape, parameters by part, estimated memory.

The plan is made from the configuration before any weights are read, so that a target that cannot be
reached or served is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bge_pruning.config.names import L0
from bge_pruning.config.schema import Config, ConfigError, DataConfig, SourceConfig
from bge_pruning.model_io.pretrained import read_shape
from bge_pruning.models.encoder_shape import (
    YAML_NAMES,
    EncoderShape,
    check_exportable,
    count_parameters,
    forward_flops,
    step_memory,
)
from bge_pruning.models.shape_choice import shapes_of_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS

BGE_M3_POSITIONS = 8194


@dataclass(frozen=True)
class Plan:
    """The shapes of a run; a target is ``None`` where another one is given, or none."""

    source: EncoderShape  # of the base model
    axes: tuple[str, ...]  # that get gates
    target: EncoderShape | None
    target_parameters: float | None  # of the encoder
    assumptions: str = ""  # about the source, in words
    target_speedup: float | None = None  # how many times fewer operations
    target_length: int = 128  # tokens of the text whose operations are counted

    @property
    def has_budget(self) -> bool:
        """Whether the gates choose the shape."""
        return self.target_parameters is not None or self.target_speedup is not None

    def choices(self) -> tuple[EncoderShape, ...]:
        """The shapes that the gates choose among for a budget, the nearest one first."""
        return shapes_of_budget(
            self.source, self.axes, self.target_parameters, self.target_speedup, self.target_length
        )


def build_plan(config: Config, folder: Path | None = None) -> Plan:
    """Resolve the shapes of a run and refuse targets that cannot be reached.

    Args:
        folder: That of the base model. ``None`` takes the sizes from the configuration, so that a
            hub model can be planned without a network.

    Raises:
        ConfigError: If sizes are missing, disagree with the base model, or the target cannot be
            exported.
    """
    if folder is None and Path(config.model.base_model).is_dir():
        folder = Path(config.model.base_model)
    if folder is None:
        source = _shape_from_config(config)
        assumptions = f"{BGE_M3_POSITIONS} positions, pooler and all heads, as BGE-M3 has them"
    else:
        source, assumptions = read_shape(folder, None), ""
        if config.model.init_missing_heads:
            colbert_dim = source.colbert_dim or source.hidden_size
            source = replace(source, sparse_head=True, colbert_dim=colbert_dim)
        for field, name in YAML_NAMES.items():
            given, real = getattr(config.model, name), getattr(source, field)
            if given is not None and given != real:
                raise ConfigError(
                    f"model.{name} is {given}, but {folder / 'config.json'} says {real}. To fix, "
                    f"set model.{name}={real} or choose another base_model."
                )
    try:
        return _resolve_target(config, source, assumptions)
    except ValueError as error:
        raise ConfigError(f"model.l0_module: {error}") from None


def _shape_from_config(config: Config) -> EncoderShape:
    model = config.model
    missing = [name for name in YAML_NAMES.values() if getattr(model, name) is None]
    if missing:
        raise ConfigError(
            f"base_model '{model.base_model}' is not a local folder, and model."
            f"{', model.'.join(missing)} not given: its sizes are unknown. To fix, give them."
        )
    if model.d_model % model.n_heads:
        raise ConfigError(
            f"model.d_model {model.d_model} is not a multiple of model.n_heads {model.n_heads}."
        )
    return EncoderShape(
        **{field: getattr(model, name) for field, name in YAML_NAMES.items()},
        head_dim=model.d_model // model.n_heads,
        max_position_embeddings=BGE_M3_POSITIONS,
        colbert_dim=model.d_model,
    )


def _resolve_target(config: Config, source: EncoderShape, assumptions: str) -> Plan:
    l0 = config.model.l0_module
    if l0 is None:
        return Plan(source, (), None, None, assumptions)
    if l0.target_model is None:
        return _resolve_budget(config, source, assumptions)
    sizes = {field: getattr(l0.target_model, name) for field, name in YAML_NAMES.items()}
    target = replace(source, **{k: v for k, v in sizes.items() if v is not None})
    check_exportable(target, source)
    if target.vocab_size != source.vocab_size:
        raise ConfigError(
            f"target vocab_size {target.vocab_size} differs from the source's "
            f"{source.vocab_size}: the vocabulary has no gates. To fix, keep it."
        )
    changed = {a for a, f in SHAPE_FIELDS.items() if getattr(target, f) != getattr(source, f)}
    ungated = sorted(changed - set(l0.pruning_modules))
    if ungated:
        raise ConfigError(
            f"the target changes {', '.join(ungated)}, which pruning_modules does not name. To "
            f"fix, add {', '.join(ungated)} or keep the size."
        )
    if not changed:
        raise ConfigError(
            "the target is the source: nothing would be pruned. To fix, choose smaller sizes."
        )
    # An axis that keeps its size gets no gates: its constraint could never be met.
    axes = tuple(axis for axis in AXES if axis in changed)
    return Plan(source, axes, target, None, assumptions, target_length=l0.target_length)


def _resolve_budget(config: Config, source: EncoderShape, assumptions: str) -> Plan:
    l0 = config.model.l0_module
    axes = set(l0.pruning_modules)
    if len(axes & {"head", "hidden"}) == 1:
        raise ConfigError(
            f"pruning_modules {l0.pruning_modules}: 'head' and 'hidden' can be exported only "
            f"together (hidden size = heads x {source.head_dim}). To fix, name both or neither."
        )
    parameters = l0.target_parameters
    if l0.target_density is not None:
        parameters = l0.target_density * count_parameters(source).encoder
    gated = tuple(axis for axis in AXES if axis in axes)
    length = l0.target_length
    plan = Plan(source, gated, None, parameters, assumptions, l0.target_speedup, length)
    nearest = plan.choices()[0]
    if parameters is not None:
        wanted, found = parameters, float(count_parameters(nearest).encoder)
        asked, has = f"{wanted:,.0f} encoder parameters", f"{found:,.0f}"
    else:
        wanted = l0.target_speedup
        found = forward_flops(source, [length]) / forward_flops(nearest, [length])
        asked, has = f"a speed-up of {wanted:g} at {length} tokens", f"{found:.3f}"
    if abs(found - wanted) > 0.01 * wanted:
        raise ConfigError(
            f"no exportable shape that differs only in {', '.join(sorted(axes))} is within 1 % of "
            f"{asked}; the nearest has {has}. To fix, choose another budget or more "
            f"pruning_modules."
        )
    return plan


def example_target(plan: Plan) -> EncoderShape | None:
    """The shape to reach, or with a budget one in the middle of those the gates choose among."""
    if not plan.has_budget:
        return plan.target
    shapes = plan.choices()
    return shapes[len(shapes) // 2]


def render_plan(plan: Plan, config: Config) -> str:
    """Render the plan as text."""
    l0 = config.model.l0_module
    lines = [f"base model   {config.model.base_model}", f"source       {plan.source.describe()}"]
    lines += _target_lines(plan)
    if plan.assumptions:
        lines.append(f"assumed      {plan.assumptions}")
    if plan.axes and config.method != L0:
        lines.append(f"chosen by    {config.method}, without gates: a baseline")
    else:
        lines.append(f"gates on     {', '.join(plan.axes) or 'nothing: ordinary training'}")
    lines += ["", *_parameter_table(plan), ""]
    lines.append(
        f"steps        {_steps(config)} (batch {config.global_train_batch_size}), evaluated "
        f"every {config.eval_interval}"
    )
    if l0 is not None and config.method == L0:
        lines.append(f"warm-up      target sparsity reached after {l0.lagrangian_warmup_steps}")
        if l0.init_order != "random":
            texts = config.baseline.calibration_texts
            lines.append(f"gates start  in the order of {l0.init_order} on {texts:,} texts")
    if config.stage == "recover" and (texts := config.teacher.refit_texts):
        lines.append(f"starts from  weights fitted to the uncut model on {texts:,} texts")
    return "\n".join([*lines, render_memory(plan, config)])


def _steps(config: Config) -> str:
    """A number of steps by its name: a step is a batch."""
    count, unit = config.max_duration[:-2], config.max_duration[-2:]
    return f"{int(count):,} = {config.max_duration}" if unit == "ba" else config.max_duration


def _target_lines(plan: Plan) -> list[str]:
    if plan.target is not None:
        return [f"target       {plan.target.describe()}"]
    if not plan.has_budget:
        return []
    if plan.target_parameters is not None:
        share = plan.target_parameters / count_parameters(plan.source).encoder
        wanted = f"{plan.target_parameters:,.0f} encoder parameters ({share:.1%})"
    else:
        length = f"{plan.target_length:,}"
        wanted = f"{plan.target_speedup:g} times fewer operations for a text of {length} tokens"
    return [
        f"target       {wanted}; the gates choose among {len(plan.choices())} exportable "
        f"shapes (scripts/choose_shape.py measures which keep most)",
        f"for example  {example_target(plan).describe()}",
    ]


def _parameter_table(plan: Plan) -> list[str]:
    source = count_parameters(plan.source).as_dict()
    if plan.target is None:
        return ["parameters   source"] + [f"{part:<12} {n:>13,}" for part, n in source.items()]
    target = count_parameters(plan.target).as_dict()
    rows = [
        f"{part:<12} {n:>13,} {target[part]:>13,} {target[part] / n if n else 1.0:>8.1%}"
        for part, n in source.items()
    ]
    return [f"{'parameters':<12} {'source':>13} {'target':>13} {'kept':>8}", *rows]


def estimate_memory(plan: Plan, config: Config, tokens: int | None = None) -> dict[str, float]:
    """Estimate the peak memory of a training step in bytes, by part, for one device.

    See :func:`step_memory`. Python, torch and its libraries need more on top.

    Args:
        tokens: Real tokens of the largest batch; default: as many as ``model.max_length`` allows.
    """
    texts = config.device_train_microbatch_size or config.global_train_batch_size
    width = max([_texts_of_row(source, config.data) for source in config.data.train], default=1)
    if tokens is None:
        tokens = texts * width * config.model.max_length
    return step_memory(
        plan.source,
        tokens,
        gated=bool(plan.axes),
        teacher=config.loss.distils and not config.teacher.cache,
        half=config.precision != "fp32",
        frozen_embeddings=config.model.freeze_embeddings,
        checkpointing=config.model.activation_checkpointing,
    )


def _texts_of_row(source: SourceConfig, data: DataConfig) -> int:
    if source.has_passages:
        return 2 + data.negatives_of(source)
    return 2 if source.kind == "sts" else 1


def render_memory(plan: Plan, config: Config, tokens: int | None = None) -> str:
    """Render the estimate of :func:`estimate_memory` as a line."""
    parts = estimate_memory(plan, config, tokens)
    detail = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items() if size)
    at = f"{config.model.max_length} tokens a text" if tokens is None else f"{tokens:,} tokens"
    return (
        f"memory       about {sum(parts.values()) / 2**30:.1f} GiB at {at} ({detail}), Python and "
        f"torch apart; an estimate, not a measurement"
    )
