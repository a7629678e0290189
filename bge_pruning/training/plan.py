"""Plan a run: its source shape and the shape, or the budget, that it is pruned to.

The plan is made from the configuration before any weights are read, so that a target that cannot be
reached or served is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.model_io.hub import fetch_model_folder
from bge_pruning.model_io.pretrained import read_shape
from bge_pruning.models.encoder_shape import (
    YAML_NAMES,
    EncoderShape,
    check_exportable,
    count_parameters,
    forward_flops,
)
from bge_pruning.models.objective import LossWeights
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
        source, assumptions = _with_new_heads(config, read_shape(folder, None)), ""
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


def _with_new_heads(config: Config, source: EncoderShape) -> EncoderShape:
    """The shape with the heads that a run makes."""
    model, own = config.model, source.colbert_dim
    if model.replace_heads:
        own = 0
    if own and model.colbert_dim not in (None, own):
        raise ConfigError(
            f"model.colbert_dim is {model.colbert_dim}, but {model.base_model} has multi-vectors "
            f"of {own}. To fix, leave it out, or set model.replace_heads=true for new heads."
        )
    if not (model.init_missing_heads or model.replace_heads):
        if model.colbert_dim and not own:
            raise ConfigError(
                f"model.colbert_dim is {model.colbert_dim}, but {model.base_model} has no "
                f"multi-vectors. To fix, leave it out, or set model.init_missing_heads=true."
            )
        return source
    size = own or model.colbert_dim or source.hidden_size
    return replace(source, sparse_head=True, colbert_dim=size)


def fetch_plan(config: Config) -> Plan:
    """The plan of a run whose base model is fetched if it is not here, see :func:`build_plan`."""
    return build_plan(config, fetch_model_folder(config.model.base_model, config.model.revision))


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


def build_loss_weights(config: Config) -> LossWeights:
    """Build the weights of the loss."""
    values = vars(config.loss)
    return LossWeights(**{**values, "contrastive_outputs": tuple(config.loss.contrastive_outputs)})
