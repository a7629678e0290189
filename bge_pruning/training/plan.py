"""Plan a run: source and target shape, parameters by part, estimated memory.

The plan is made from the configuration before any weights are read, so that a target that cannot be
reached or served is refused at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from bge_pruning.config.checks import share_of_run
from bge_pruning.config.names import L0
from bge_pruning.config.schema import Config, ConfigError, DataConfig, SourceConfig
from bge_pruning.datasets.mixed_dataloader import BatchSize
from bge_pruning.datasets.teacher_vectors import compute_cache_bytes
from bge_pruning.model_io.pretrained import read_shape
from bge_pruning.models.encoder_shape import (
    YAML_NAMES,
    EncoderShape,
    LossMemory,
    check_exportable,
    count_parameters,
    forward_flops,
    step_memory,
)
from bge_pruning.models.objective import LossWeights, loss_memory
from bge_pruning.models.shape_choice import shapes_of_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS
from bge_pruning.models.teacher import HIDDEN
from bge_pruning.utils.environment import torch_device

BGE_M3_POSITIONS = 8194
# Below this share of the encoder the plan warns.
SMALL = 0.1


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
    def outputs(self) -> list[str]:
        """Names of what the base model computes."""
        heads = {"token_weights": self.source.sparse_head, "colbert_vecs": self.source.colbert_dim}
        return ["dense_vecs", *(name for name, there in heads.items() if there)]

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
        assumptions = (
            f"{BGE_M3_POSITIONS} positions, pooler and all heads, as BGE-M3 has them; "
            f"{config.model.base_model} is no folder here"
        )
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
            f"model.d_model {model.d_model} is not a multiple of model.n_heads {model.n_heads}. "
            f"To fix, write the sizes of its config.json."
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
    """Render the plan as text, with the memory of the largest batch that may come."""
    return "\n".join([*render_run(plan, config), render_memory(plan, config)])


def render_run(plan: Plan, config: Config) -> list[str]:
    """Render all of the plan but the memory of a step, which follows from the data."""
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
        f"{_when(config.eval_interval, config)}, saved {_when(config.save_interval, config)}"
    )
    lines += [
        f"negatives    {source.name}: {config.data.negatives_of(source)} of its own a query, none "
        f"of the batch"
        for source in config.data.train
        if not source.in_batch_negatives
    ]
    if l0 is not None and config.method == L0:
        lines.append(f"warm-up      target sparsity reached after {l0.lagrangian_warmup_steps}")
        if l0.init_order != "random":
            texts = config.baseline.calibration_texts
            lines.append(f"gates start  in the order of {l0.init_order} on {texts:,} texts")
    if config.stage == "recover" and (texts := config.teacher.refit_texts):
        lines.append(f"starts from  weights fitted to the uncut model on {texts:,} texts")
    return [*lines, render_disk(plan, config)]


def _when(interval: str, config: Config) -> str:
    share = share_of_run(interval, config.max_duration)
    return "at the end" if share is not None and share >= 1 else f"every {interval}"


def _steps(config: Config) -> str:
    """A number of steps by its name: a step is a batch."""
    count, unit = config.max_duration[:-2], config.max_duration[-2:]
    return f"{int(count):,} = {config.max_duration}" if unit == "ba" else config.max_duration


def _target_lines(plan: Plan) -> list[str]:
    shape = example_target(plan)
    if shape is None:
        return []
    lines = _target_size(plan)
    kept = count_parameters(shape).encoder / count_parameters(plan.source).encoder
    if kept < SMALL:
        lines.append(
            f"warning      only {kept:.1%} of the encoder stay; below {SMALL:.0%} nothing was "
            f"measured. Compare the result with a model that was trained at this size"
        )
    return lines


def _target_size(plan: Plan) -> list[str]:
    if plan.target is not None:
        return [f"target       {plan.target.describe()}"]
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
    shape = example_target(plan)
    if shape is None:
        return ["parameters   source"] + [f"{part:<12} {n:>13,}" for part, n in source.items()]
    target, column = count_parameters(shape).as_dict(), "example" if plan.has_budget else "target"
    rows = [
        f"{part:<12} {n:>13,} {target[part]:>13,} {target[part] / n if n else 1.0:>8.1%}"
        for part, n in source.items()
    ]
    return [f"{'parameters':<12} {'source':>13} {column:>13} {'kept':>8}", *rows]


def build_loss_weights(config: Config) -> LossWeights:
    """Build the weights of the loss."""
    values = vars(config.loss)
    return LossWeights(**{**values, "contrastive_outputs": tuple(config.loss.contrastive_outputs)})


def largest_batch(config: Config) -> BatchSize:
    """The largest batch that a configuration allows: all texts have ``model.max_length`` tokens."""
    width = max([_texts_of_row(source, config.data) for source in config.data.train], default=1)
    length = config.model.max_length
    return BatchSize(_rows_at_once(config) * width * length, width, length)


def _texts_of_row(source: SourceConfig, data: DataConfig) -> int:
    if source.has_passages:
        return 2 + data.negatives_of(source)
    return 2 if source.kind == "sts" else 1


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rows(config: Config) -> int:
    """Rows of a batch on one device."""
    return max(1, config.global_train_batch_size // _ranks())


def _rows_at_once(config: Config) -> int:
    return min(config.device_train_microbatch_size or _rows(config), _rows(config))


def estimate_memory(
    plan: Plan, config: Config, largest: BatchSize | None = None
) -> dict[str, float]:
    """Estimate the peak memory of a training step in bytes, by part, for one device.

    See :func:`step_memory`. Python, torch and its libraries need more on top, sharding less.

    Args:
        largest: The largest batch; default: that of :func:`largest_batch`.
    """
    largest = largest or largest_batch(config)
    rows, at_once = _rows(config), _rows_at_once(config)
    cached = config.teacher.cache is True
    # The model splits a batch whose texts are compared, the trainer any other.
    whole = rows if config.loss.compares_texts else at_once
    sizes = (whole, largest.width, largest.length, at_once, _ranks(), cached)
    loss = loss_memory(build_loss_weights(config), plan.source, *sizes)
    if whole < rows:
        loss = LossMemory(loss.outputs, 0.0, max(loss.comparing, loss.backward), in_pieces=True)
    return step_memory(
        plan.source,
        largest.tokens,
        gated=bool(plan.axes) and config.method == L0,
        teacher=config.loss.distils and not cached,
        half=config.precision != "fp32",
        frozen_embeddings=config.model.freeze_embeddings,
        checkpointing=config.model.activation_checkpointing,
        loss=loss,
        ranks=1 if config.parallelism.fsdp else _ranks(),
    )


def render_memory(plan: Plan, config: Config, largest: BatchSize | None = None) -> str:
    """Render the estimate of :func:`estimate_memory` as a line."""
    parts = estimate_memory(plan, config, largest)
    detail = ", ".join(f"{n} {size / 2**30:.1f}" for n, size in parts.items() if size >= 2**30 / 20)
    largest = largest or largest_batch(config)
    device = {"cuda": "GPU"}.get(torch_device(config.device), "CPU")
    where = f"the {device}" if _ranks() == 1 else f"each of {_ranks()} {device}s"
    rows, texts = (
        f"{count} {noun}{'s' * (count > 1)}"
        for count, noun in ((_rows_at_once(config), "row"), (largest.width, "text"))
    )
    return (
        f"memory       about {sum(parts.values()) / 2**30:.1f} GiB on {where} in "
        f"{config.precision}, at once {rows} x {texts} of up to {largest.length:,} tokens"
        f"{f' ({detail})' if detail else ''}; an estimate, Python and torch apart"
    )


def render_disk(plan: Plan, config: Config) -> str:
    """Render what a run writes as a line: checkpoints, and the teacher's outputs if cached."""
    total = float(count_parameters(plan.source).total)
    frozen = plan.source.vocab_size * plan.source.hidden_size * config.model.freeze_embeddings
    one = 4.0 * total + 8.0 * (total - frozen)  # with AdamW's moments
    line = (
        f"disk         {config.checkpoints_to_keep} checkpoints of {one / 2**30:.1f} GiB in "
        f"{config.run_folder}"
    )
    names, shape = build_loss_weights(config).distilled, plan.source
    if not names or HIDDEN in names or config.teacher.cache is False:
        return line
    tokens = 1000 * config.model.max_length
    size = compute_cache_bytes(1000, tokens, names, shape.hidden_size, shape.colbert_dim)
    kept = "" if config.teacher.cache is True else ", if they are kept,"
    return (
        f"{line}; the teacher's outputs in {config.data.processed_folder}{kept} take up to "
        f"{size / 2**20:,.1f} MiB for every 1,000 texts"
    )
