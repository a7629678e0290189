"""What a run will do and take, as text: shapes, parameters, steps, memory and disk."""

from __future__ import annotations

import operator
import os
from itertools import pairwise

from bge_pruning.config.checks import share_of_run
from bge_pruning.config.data_checks import mixture_ends
from bge_pruning.config.names import L0
from bge_pruning.config.schema import Config, DataConfig, SourceConfig
from bge_pruning.datasets.mixed_dataloader import BatchSize
from bge_pruning.datasets.teacher_vectors import compute_cache_bytes
from bge_pruning.models.encoder_shape import (
    LossMemory,
    count_parameters,
    forward_flops,
    step_memory,
)
from bge_pruning.models.objective import loss_memory
from bge_pruning.models.teacher import HIDDEN, LAST
from bge_pruning.training.plan import Plan, build_loss_weights, example_target
from bge_pruning.utils.environment import torch_device

# Below this share of the encoder the plan warns.
SMALL = 0.1
# Operations a second of a step on an H100 in bf16, see docs/speed.md: BGE-M3's shape, 64 texts of
# 512 tokens, with gates, and with a teacher in the step alike.
H100_FLOPS = 3.1e14
SHORT = 0.1  # hours that are not said


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
        plain = "heads alone" if config.model.freeze_encoder else "ordinary training"
        lines.append(f"gates on     {', '.join(plan.axes) or f'nothing: {plain}'}")
    lines += ["", *_parameter_table(plan), ""]
    lines.append(
        f"steps        {_steps(config)} (batch {config.global_train_batch_size}), evaluated "
        f"{_when(config.eval_interval, config)}, saved {_when(config.save_interval, config)}"
    )
    lines += _mixture_lines(config)
    lines += [
        f"lines        {source.name}: {source.lines} of each file of {source.path}"
        for source in [*config.data.train, *config.data.eval]
        if source.lines is not None
    ]
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
    return [*lines, *_cost_lines(plan, config), render_disk(plan, config)]


def _mixture_lines(config: Config) -> list[str]:
    """Which sources the batches of each part of the run come from."""
    ends = mixture_ends(config)
    if ends is None:  # the run has as many steps as its data have
        parts = [f"until {part.until or f'+{part.steps}ba'}" for part in config.data.stages]
    else:
        bounds = pairwise([0, *ends])
        parts = [f"steps {first + 1:,} to {end:,}" for first, end in bounds]
    lines = []
    for name, part in zip(parts, config.data.stages, strict=True):
        total = sum(part.weights.values())
        shares = [f"{source} {n / total:.1%}" for source, n in part.weights.items() if n]
        lines.append(f"mixture      {name}: {', '.join(shares) or 'all sources'}")
    return lines


def _cost_lines(plan: Plan, config: Config) -> list[str]:
    """Tokens and time of the run, and of the recovery that follows it, if both are in steps."""
    if config.model.freeze_encoder or (config.method != L0 and config.stage != "recover"):
        return []  # nothing is trained, or the heads alone
    recovery = {"max_duration": config.max_duration} | (config.recovery or {})
    stages = {"this run": (plan.source, vars(config))}
    if config.stage != "recover" and (target := example_target(plan)) is not None:
        stages["recovery"] = (target, {**vars(config), **recovery})
    length = config.model.max_length
    found, hours = [], 0.0
    for name, (shape, keys) in stages.items():
        if not keys["max_duration"].endswith("ba"):
            return []
        tokens = int(keys["max_duration"][:-2]) * keys["global_train_batch_size"] * length
        tokens *= _mean_texts_of_row(config.data)
        # Forward and backward of the student, and forward of the teacher.
        passes = 3.0 * forward_flops(shape, [length])
        passes += forward_flops(plan.source, [length]) * config.loss.distils
        hours += tokens / length * passes / H100_FLOPS / 3600
        found.append(f"{name} {tokens / 1e6:,.1f}")
    time = f"; on an H100 {hours:,.1f} hours in bf16, by the steps in docs/speed.md"
    line = f"tokens       {', '.join(found)} million, if all texts had {length:,} tokens"
    return [line + time * (hours >= SHORT)]


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


def largest_batch(config: Config) -> BatchSize:
    """The largest batch that a configuration allows: all texts have ``model.max_length`` tokens."""
    width = max([_texts_of_row(source, config.data) for source in config.data.train], default=1)
    length = config.model.max_length
    return BatchSize(_rows_at_once(config) * width * length, width, length)


def _texts_of_row(source: SourceConfig, data: DataConfig) -> int:
    if source.has_passages:
        return 2 + data.negatives_of(source)
    return 2 if source.kind == "sts" else 1


def _mean_texts_of_row(data: DataConfig) -> float:
    """Of all batches; without weights, as if the sources had as many rows."""
    texts = [_texts_of_row(source, data) for source in data.train]
    weights = [1.0 if source.weight is None else source.weight for source in data.train]
    return sum(map(operator.mul, texts, weights)) / sum(weights)


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
        frozen_encoder=config.model.freeze_encoder,
        # At most: which words the data have is not known here.
        drawn_rows=None if config.parallelism.fsdp else plan.source.vocab_size,
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
    counts, model = count_parameters(plan.source), config.model
    table = plan.source.vocab_size * plan.source.hidden_size
    trained = (
        counts.heads if model.freeze_encoder else counts.total - table * model.freeze_embeddings
    )
    one = 4.0 * counts.total + 8.0 * trained  # with AdamW's moments
    # Words that are in no batch have none.
    whole = model.freeze_encoder or model.freeze_embeddings or config.parallelism.fsdp
    most = "" if whole else "up to "
    line = (
        f"disk         {config.checkpoints_to_keep} checkpoints of {most}{one / 2**30:.1f} GiB in "
        f"{config.run_folder}"
    )
    names, shape = build_loss_weights(config).distilled, plan.source
    if config.model.freeze_encoder:
        names = (LAST,)
    if not names or HIDDEN in names or config.teacher.cache is False:
        return line
    tokens = 1000 * config.model.max_length
    size = compute_cache_bytes(1000, tokens, names, shape.hidden_size, shape.colbert_dim)
    kept = "" if config.teacher.cache is True else ", if they are kept,"
    what = "states of the encoder" if config.model.freeze_encoder else "the teacher's outputs"
    return (
        f"{line}; {what} in {config.data.processed_folder}{kept} take up to "
        f"{size / 2**20:,.1f} MiB for every 1,000 texts"
    )
