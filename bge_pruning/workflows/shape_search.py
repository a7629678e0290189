"""Which of the shapes that meet a budget keeps most: each is cut and refitted, none is trained.

How far a cut model that was fitted by least squares is from the whole one ranked six shapes of the
small model as training did, see experiments/results/quality/notes.md; gates with a budget have to
choose while they still learn, and chose worse.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.config.load import Config, ConfigError
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.evaluation.statistics import cosine_error, error_difference
from bge_pruning.model_io.checkpoint import cut
from bge_pruning.model_io.hub import fetch_model_folder
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.encoder_shape import (
    YAML_NAMES,
    EncoderShape,
    count_parameters,
    forward_flops,
)
from bge_pruning.models.shape_choice import best_shape, shapes_of_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS
from bge_pruning.models.teacher import compute_outputs
from bge_pruning.selection.importance import masks_of_importance
from bge_pruning.selection.reconstruction import refit_
from bge_pruning.selection.reconstruction_importance import reconstruction_importance
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.calibration import calibration_texts, pad_batches
from bge_pruning.training.plan import Plan, build_plan
from bge_pruning.utils.devices import torch_device
from bge_pruning.utils.embedding_metrics import is_flat
from bge_pruning.utils.environment import collect_versions

log = logging.getLogger(__name__)
# Texts that shapes are judged on, if there are as many beside those that they are fitted to.
JUDGED_TEXTS = 256
# With fewer, which shape is best would be chance.
FEWEST_JUDGED = 16
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MeasuredShape:
    """How far a cut and fitted model is from the whole one, on texts that it was not fitted to.

    Attributes:
        shape: Its sizes.
        layers: The source's layers that it keeps.
        cosine_error: Of dense vectors, see :func:`cosine_error`.
        above_best: 95 % interval of what that is above the error of the best shape, over texts.
        multi_vector_error: One minus the mean cosine of multi-vectors with the source's; ``None``
            without such a head.
        seconds: What it took.
    """

    shape: EncoderShape
    layers: tuple[int, ...]
    cosine_error: float
    above_best: tuple[float, float]
    multi_vector_error: float | None
    seconds: float


@dataclass(frozen=True)
class ShapeSearch:
    """What was measured.

    Attributes:
        base_model: Folder or hub name of the source.
        revision: Of the hub.
        source: Its sizes.
        plan: The target of the configuration.
        train: Names of the sources of texts.
        candidates: Number of shapes that meet the budget.
        fitted_texts: Number of texts that the shapes were fitted to.
        judged_texts: Number of texts that they are judged on.
        seed: Of the choice of texts.
        measured: The shapes that were measured, the best first.
    """

    base_model: str
    revision: str | None
    source: EncoderShape
    plan: Plan
    train: tuple[str, ...]
    candidates: int
    fitted_texts: int
    judged_texts: int
    seed: int
    measured: tuple[MeasuredShape, ...]

    @property
    def override(self) -> str:
        """``key=value`` that sets the best shape as the target of the configuration."""
        return _override(self.measured[0].shape, self.plan)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {**asdict(self), "override": self.override, "versions": collect_versions()}
        plan = found.pop("plan")
        kept = ("target", "target_parameters", "target_speedup", "target_length")
        return {**found, **{key: plan[key] for key in kept}}


def search_shapes(config: Config, every: bool = False) -> ShapeSearch:
    """Measure the shapes that meet the budget of a configuration.

    Heads and units go in the order of :func:`reconstruction_importance`, measured on the
    ``baseline.calibration_texts`` training texts to which each cut model is then fitted.

    Args:
        config: A run with a target; that of a shape stands for its number of parameters.
        every: Measure all shapes, not only those that :func:`best_shape` asks for.

    Raises:
        ConfigError: If there is no target or no training data, or the target cannot be reached.
        OSError: If the model cannot be had.
        ValueError: If the training data have too few texts.
    """
    plan = check_search(config)
    base = build_base_model(config)
    candidates = find_candidates(config, plan, base.shape)
    texts = calibration_texts(config, base, config.baseline.calibration_texts + JUDGED_TEXTS)
    fitted, judged = split_texts(texts, config.baseline.calibration_texts)
    judge = _Judge(config, base, texts, fitted, judged)
    if every:
        for shape in candidates:
            judge.error(shape)
    else:
        best_shape(candidates, judge.error)
    return ShapeSearch(
        base_model=config.model.base_model,
        revision=config.model.revision,
        source=base.shape,
        plan=plan,
        train=tuple(source.name for source in config.data.train),
        candidates=len(candidates),
        fitted_texts=len(fitted),
        judged_texts=len(judged),
        seed=config.seed,
        measured=judge.ranked(config.seed),
    )


def check_search(config: Config) -> Plan:
    """Refuse what can be refused before any weights are read.

    Args:
        config: See :func:`search_shapes`, also for what is raised.
    """
    if config.stage == "recover":
        raise ConfigError(
            "stage is recover, whose model is cut already. To fix, leave stage out: shapes are "
            "chosen before pruning."
        )
    if config.model.l0_module is None:
        raise ConfigError(
            "model.l0_module is null: there is no size to choose a shape for. To fix, set e.g. "
            "model.l0_module.target_density=0.6."
        )
    if not config.data.train:
        raise ConfigError(
            "data.train is empty: shapes are fitted to and judged on its texts. To fix, add texts "
            "like those that will be embedded."
        )
    return build_plan(config, fetch_model_folder(config.model.base_model, config.model.revision))


def find_candidates(config: Config, plan: Plan, source: EncoderShape) -> list[EncoderShape]:
    """The shapes to choose from; a target shape is the one of its layers and heads.

    Args:
        config: The run.
        plan: Its target.
        source: Sizes of the loaded model.

    Raises:
        ConfigError: If only the source itself meets the budget.
    """
    parameters = plan.target_parameters
    if plan.target is not None:
        parameters = float(count_parameters(plan.target).encoder)
    axes = tuple(axis for axis in AXES if axis in config.model.l0_module.pruning_modules)
    shapes = shapes_of_budget(
        plan.source, axes, parameters, plan.target_speedup, plan.target_length
    )
    found = {(s.num_hidden_layers, s.num_attention_heads): s for s in shapes}
    if plan.target is not None:
        found[plan.target.num_hidden_layers, plan.target.num_attention_heads] = plan.target
    # The outer parts are those that the loaded weights really have.
    sizes = [{f: getattr(shape, f) for f in SHAPE_FIELDS.values()} for shape in found.values()]
    smaller = [shape for size in sizes if (shape := replace(source, **size)) != source]
    if not smaller:
        raise ConfigError(
            "only the model as it is meets the target of model.l0_module: there is nothing to "
            "prune. To fix, choose a smaller target."
        )
    return smaller


def split_texts(texts: TokenizedTexts, wanted: int) -> tuple[list[int], list[int]]:
    """Texts to fit to and texts to judge on, none of them in both.

    With few texts a third is judged on.

    Args:
        texts: In random order; those of several sources may be there twice.
        wanted: How many to fit to.

    Raises:
        ValueError: If fewer than ``FEWEST_JUDGED`` are left to judge on.
    """
    first = {texts[i].tobytes(): i for i in reversed(range(len(texts)))}
    different = sorted(first.values())
    fitted = min(wanted, len(different) - min(JUDGED_TEXTS, len(different) // 3))
    judged = different[fitted:][:JUDGED_TEXTS]
    if len(judged) < FEWEST_JUDGED:
        raise ValueError(
            f"the training data have {len(different)} different texts, too few to tell shapes "
            f"apart: {3 * FEWEST_JUDGED} are needed. To fix, add texts to data.train."
        )
    return different[:fitted], judged


class _Judge:
    """Cuts, fits and measures shapes.

    Args:
        config: The run.
        base: The unpruned model; it is moved to the run's device.
        texts: Training texts.
        fitted: Which of them shapes are fitted to.
        judged: Which they are judged on.

    Raises:
        ValueError: If the unpruned model gives all pairs of texts the same cosine.
    """

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        texts: TokenizedTexts,
        fitted: Sequence[int],
        judged: Sequence[int],
    ) -> None:
        device = torch_device(config.device)
        self.fit = list(pad_batches(texts, fitted, config, base, device))
        self.test = list(pad_batches(texts, judged, config, base, device))
        self.source = base.backbone.to(device).eval()
        self.heads = base.heads.to(device).eval()
        self.names = [n for n in ("dense_vecs", "colbert_vecs") if n in base.heads.names()]
        self.wanted = self._outputs(self.source, self.heads)
        self.wanted_cosines = _cosines(self.wanted)
        if is_flat(self.wanted_cosines[np.triu_indices(len(judged), k=1)]):
            raise ValueError(
                f"{base.name} gives all pairs of texts the same cosine, so that no shape can be "
                f"compared with it. To fix, use another base_model."
            )
        self.importance = reconstruction_importance(self.source, self.heads, self.fit, config.seed)
        self.measured: dict[EncoderShape, MeasuredShape] = {}
        self.cosines: dict[EncoderShape, np.ndarray] = {}

    @torch.no_grad()
    def error(self, shape: EncoderShape) -> float:
        """The error of the cosines of a shape, measured now."""
        started = time.monotonic()
        keep = self.source.keep_indices(masks_of_importance(self.importance, shape))
        # Cutting replaces tables of embeddings and fitting leaves them alone: no need of a copy.
        shared = {id(p): p for p in self.source.embeddings.parameters()}
        backbone, heads = copy.deepcopy(self.source, shared), copy.deepcopy(self.heads)
        cut(backbone, heads, keep)
        refit_(backbone, self.source, keep.layer, keep.hidden, self.fit)
        found = self._outputs(backbone, heads)
        self.cosines[shape] = _cosines(found)
        multi = None
        if "colbert_vecs" in self.names:
            pair = (found["colbert_vecs"], self.wanted["colbert_vecs"])
            multi = 1.0 - float(torch.cosine_similarity(*pair, dim=-1).mean())
        error = cosine_error(self.cosines[shape], self.wanted_cosines)
        seconds = time.monotonic() - started
        layers = tuple(keep.layer)
        self.measured[shape] = MeasuredShape(shape, layers, error, (0.0, 0.0), multi, seconds)
        log.info("%s: error of cosines %.4f, %.0f s", shape.describe(), error, seconds)
        return error

    def ranked(self, seed: int) -> tuple[MeasuredShape, ...]:
        """The shapes that were measured, the best first, each compared with it.

        Args:
            seed: Of the bootstrap.
        """
        ranked = sorted(self.measured.values(), key=lambda m: m.cosine_error)
        best = self.cosines[ranked[0].shape]
        found = [ranked[0]]
        for m in ranked[1:]:
            above = error_difference(self.cosines[m.shape], best, self.wanted_cosines, seed)
            found.append(replace(m, above_best=above))
        return tuple(found)

    @torch.no_grad()
    def _outputs(self, backbone: torch.nn.Module, heads: torch.nn.Module) -> dict[str, Tensor]:
        """Of the texts to judge on: dense vectors ``(N, H)``, multi-vectors ``(tokens, C)``."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for ids, mask in self.test:
            outputs = compute_outputs(backbone, heads, ids, mask, self.names)
            found["dense_vecs"].append(outputs["dense_vecs"].float().cpu())
            if "colbert_vecs" in self.names:
                vectors = outputs["colbert_vecs"][mask[:, 1:].bool()]
                found["colbert_vecs"].append(vectors.float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}


def _cosines(outputs: dict[str, Tensor]) -> np.ndarray:
    """Cosines of all texts with all, shape ``(N, N)``."""
    vectors = outputs["dense_vecs"]
    return (vectors @ vectors.T).numpy()


def _override(shape: EncoderShape, plan: Plan) -> str:
    # All sizes, since those that a configuration has and an override lacks would stay.
    pruned = set(SHAPE_FIELDS.values())
    sizes = ", ".join(f"{n}: {getattr(shape, f)}" for f, n in YAML_NAMES.items() if f in pruned)
    if plan.target is not None:
        return f"model.l0_module.target_model={{{sizes}}}"
    budgets = ("target_density", "target_parameters")
    if plan.target_speedup is not None:
        budgets = ("target_speedup",)
    others = "".join(f", {name}: null" for name in budgets)
    return f"model.l0_module={{target_model: {{{sizes}}}{others}}}"


def search_rows(search: ShapeSearch) -> tuple[list[str], list[list[str]]]:
    """A table of what was measured, the best first: its header and its cells."""
    length = search.plan.target_length
    full = count_parameters(search.source).encoder
    header = [
        *("keeps layers", "layers", "hidden", "heads", "units", "encoder"),
        *(f"speed-up at {length}", "error of cosines", "above the best", "of multi-vectors"),
    ]
    rows = []
    for index, m in enumerate(search.measured):
        s, multi, (low, high) = m.shape, m.multi_vector_error, m.above_best
        speedup = forward_flops(search.source, [length]) / forward_flops(s, [length])
        rows.append(
            [
                render_spans(m.layers),
                *(str(getattr(s, f)) for f in ("num_hidden_layers", "hidden_size")),
                *(str(getattr(s, f)) for f in ("num_attention_heads", "intermediate_size")),
                f"{count_parameters(s).encoder / full:.1%}",
                f"{speedup:.2f}",
                f"{m.cosine_error:.4f}",
                f"{low:.4f} to {high:.4f}" if index else "",
                "none" if multi is None else f"{multi:.4f}",
            ]
        )
    return header, rows


def render_spans(layers: Sequence[int]) -> str:
    """Ascending numbers with runs shortened, such as ``0, 2-5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def summarise(search: ShapeSearch) -> str:
    """What was measured, which shapes are as good as the best, and the override that sets it."""
    ties = sum(m.above_best[0] <= 0 for m in search.measured[1:])
    told = f"{ties} of the others may be as good" if ties else "the others are worse"
    return (
        f"{len(search.measured)} of {search.candidates} shapes measured, fitted to "
        f"{search.fitted_texts:,} texts and judged on {search.judged_texts} others; none was "
        f"trained.\nThe best of them ({told}, by 95 % intervals over the texts):\n"
        f'"{search.override}"'
    )
