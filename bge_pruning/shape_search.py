"""Which of the shapes that meet a budget keeps most: each is cut and fitted, none is trained.

The order in which training leaves shapes of one size is mostly there before it, in how far a cut
model that was fitted by least squares is from the whole one; gates with a budget have to choose
while they still learn.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bge_pruning.builders import build_base_model
from bge_pruning.calibration import calibration_texts, measure_importance, pad_batches
from bge_pruning.config import Config, ConfigError
from bge_pruning.models.encoder_shape import (
    YAML_NAMES,
    EncoderShape,
    count_parameters,
    forward_flops,
)
from bge_pruning.models.extraction import cut
from bge_pruning.models.hub import fetch_model_folder
from bge_pruning.models.importance import Importance, masks_of_importance
from bge_pruning.models.pretrained import BaseModel
from bge_pruning.models.reconstruction import refit_
from bge_pruning.models.shape_choice import best_shape, shapes_of_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS
from bge_pruning.models.teacher import compute_outputs
from bge_pruning.plan import Plan, build_plan
from bge_pruning.utils.devices import torch_device
from bge_pruning.utils.embedding_metrics import is_flat

log = logging.getLogger(__name__)

# Texts that shapes are judged on, if there are as many beside those that they are fitted to.
JUDGED_TEXTS = 256
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class MeasuredShape:
    """How far a cut and fitted model is from the whole one, on texts that it was not fitted to.

    Attributes:
        shape: Its sizes.
        layers: The source's layers that it keeps.
        cosine_error: One minus the correlation of the cosines of all pairs of texts with those of
            the source, by dense vectors.
        multi_vector_error: One minus the mean cosine of multi-vectors with the source's; ``None``
            without such a head.
        seconds: What it took.
    """

    shape: EncoderShape
    layers: tuple[int, ...]
    cosine_error: float
    multi_vector_error: float | None
    seconds: float


@dataclass(frozen=True)
class ShapeSearch:
    """What was measured.

    Attributes:
        plan: Of the run; its source has the sizes of the configuration.
        candidates: Number of shapes that meet the budget.
        fitted_texts: Number of texts that the shapes were fitted to.
        judged_texts: Number of texts that they are judged on.
        seed: Of the choice of texts.
        measured: The shapes that were measured, the best first.
    """

    plan: Plan
    candidates: int
    fitted_texts: int
    judged_texts: int
    seed: int
    measured: tuple[MeasuredShape, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {**vars(self), "plan": None, "measured": [asdict(m) for m in self.measured]}
        del found["plan"]
        return found


def search_shapes(config: Config, every: bool = False) -> ShapeSearch:
    """Measure the shapes that meet the budget of a configuration.

    Heads and units go in the order of :func:`reconstruction_importance`, measured on
    ``baseline.calibration_texts`` training texts, to which each cut model is fitted.

    Args:
        config: A run with a target; that of a shape stands for its number of parameters.
        every: Measure all shapes, not only those that :func:`best_shape` asks for.

    Raises:
        ConfigError: If there is no target, or it cannot be reached.
        OSError: If the model cannot be had.
        ValueError: If the training data have fewer than two texts.
    """
    plan = check_search(config)
    base = build_base_model(config)
    candidates = find_candidates(config, plan, base.shape)
    judge = _Judge(config, base, measure_importance("reconstruction", config, base))
    if every:
        for shape in candidates:
            judge.error(shape)
    else:
        best_shape(candidates, judge.error)
    measured = sorted(judge.measured.values(), key=lambda m: m.cosine_error)
    counts = (len(candidates), judge.fitted, judge.judged)
    return ShapeSearch(plan, *counts, config.seed, tuple(measured))


def check_search(config: Config) -> Plan:
    """Refuse what can be refused before any weights are read.

    Args:
        config: See :func:`search_shapes`, also for what is raised.
    """
    if config.model.l0_module is None:
        raise ConfigError(
            "model.l0_module is null: there is no size to choose a shape for. To fix, set e.g. "
            "model.l0_module.target_density=0.6."
        )
    return build_plan(config, fetch_model_folder(config.model.base_model, config.model.revision))


def find_candidates(config: Config, plan: Plan, source: EncoderShape) -> list[EncoderShape]:
    """The shapes to choose from; a target shape is the one of its layers and heads.

    Args:
        config: The run.
        plan: Its target.
        source: Sizes of the loaded model.
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
    sizes = [{field: getattr(shape, field) for field in YAML_NAMES} for shape in found.values()]
    return [EncoderShape(**{**asdict(source), **size}) for size in sizes]


class _Judge:
    """Cuts, fits and measures shapes.

    Attributes:
        measured: By shape, what was measured so far.
        fitted: Number of texts that shapes are fitted to.
        judged: Number of texts that they are judged on.
    """

    def __init__(self, config: Config, base: BaseModel, importance: Importance) -> None:
        self.base, self.importance = base, importance
        self.measured: dict[EncoderShape, MeasuredShape] = {}
        device, wanted = torch_device(config.device), config.baseline.calibration_texts
        texts = calibration_texts(config, base, wanted + JUDGED_TEXTS)
        # With few texts a third is enough to judge by.
        self.judged = min(JUDGED_TEXTS, max(2, len(texts) // 3))
        self.fitted = len(texts) - self.judged
        if self.fitted < 1:
            raise ValueError(
                f"the training data have {len(texts)} texts, too few to fit and to judge shapes. "
                f"To fix, add texts to data.train."
            )
        parts = range(self.fitted), range(self.fitted, len(texts))
        self.fit, self.test = (
            list(pad_batches(texts, part, config, base, device)) for part in parts
        )
        self.source = base.backbone.to(device).eval()
        self.heads = base.heads.to(device).eval()
        self.names = [n for n in ("dense_vecs", "colbert_vecs") if n in base.heads.names()]
        self.wanted = self._outputs(self.source, self.heads)

    @torch.no_grad()
    def error(self, shape: EncoderShape) -> float:
        """The error of the cosines of a shape, measured now."""
        started = time.monotonic()
        keep = self.source.keep_indices(masks_of_importance(self.importance, shape))
        backbone, heads = copy.deepcopy(self.source), copy.deepcopy(self.heads)
        cut(backbone, heads, keep)
        refit_(backbone, self.source, keep.layer, keep.hidden, self.fit)
        found = self._outputs(backbone, heads)
        multi = None
        if "colbert_vecs" in self.names:
            multi = 1.0 - _mean_cosine(found["colbert_vecs"], self.wanted["colbert_vecs"])
        cosines = (_pair_cosines(o["dense_vecs"]) for o in (found, self.wanted))
        self.measured[shape] = result = MeasuredShape(
            shape, tuple(keep.layer), cosine_error(*cosines), multi, time.monotonic() - started
        )
        log.info(
            "%s: error of cosines %.4f, %.0f s",
            shape.describe(),
            result.cosine_error,
            result.seconds,
        )
        return result.cosine_error

    @torch.no_grad()
    def _outputs(self, backbone: torch.nn.Module, heads: torch.nn.Module) -> dict[str, Tensor]:
        """Of the texts to judge by: dense vectors ``(N, H)``, multi-vectors ``(tokens, C)``."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for ids, mask in self.test:
            outputs = compute_outputs(backbone, heads, ids, mask, self.names)
            found["dense_vecs"].append(outputs["dense_vecs"].float().cpu())
            if "colbert_vecs" in self.names:
                vectors = outputs["colbert_vecs"][mask[:, 1:].bool()]
                found["colbert_vecs"].append(vectors.float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}


def _pair_cosines(vectors: Tensor) -> np.ndarray:
    """Cosines of all pairs of L2-normalised vectors, shape ``(N (N - 1) / 2,)``."""
    rows, columns = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return (vectors @ vectors.T)[rows, columns].numpy()


def _mean_cosine(found: Tensor, wanted: Tensor) -> float:
    return float(torch.cosine_similarity(found, wanted, dim=-1).mean())


def cosine_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """One minus the correlation of cosines; 1 if those of one side are all alike.

    Args:
        found: Of the cut model, shape ``(pairs,)``.
        wanted: Of the whole one, in the same order.
    """
    if is_flat(found) or is_flat(wanted):
        return 1.0
    return 1.0 - float(np.corrcoef(found, wanted)[0, 1])


def search_rows(search: ShapeSearch) -> tuple[list[str], list[list[str]]]:
    """A table of what was measured, the best first: its header and its cells."""
    source, length = search.plan.source, search.plan.target_length
    full = count_parameters(source).encoder
    header = [
        *("keeps layers", "layers", "hidden", "heads", "units", "encoder"),
        *(f"speed-up at {length}", "error of cosines", "of multi-vectors"),
    ]
    rows = []
    for m in search.measured:
        s, multi = m.shape, m.multi_vector_error
        sizes = (s.num_hidden_layers, s.hidden_size, s.num_attention_heads, s.intermediate_size)
        speedup = forward_flops(source, [length]) / forward_flops(s, [length])
        rows.append(
            [
                render_spans(m.layers),
                *map(str, sizes),
                f"{count_parameters(s).encoder / full:.1%}",
                f"{speedup:.2f}",
                f"{m.cosine_error:.4f}",
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
    """What was measured, and the override that sets the best shape."""
    return (
        f"{len(search.measured)} of {search.candidates} shapes measured, fitted to "
        f"{search.fitted_texts:,} texts and judged on {search.judged_texts} others; none was "
        f"trained.\nThe best of them: {_override(search.measured[0].shape, search.plan)}"
    )


def _override(shape: EncoderShape, plan: Plan) -> str:
    # All sizes, since those that a configuration has and an override lacks would stay.
    sizes = ", ".join(f"{YAML_NAMES[f]}: {getattr(shape, f)}" for f in SHAPE_FIELDS.values())
    if plan.target is not None:
        return f'"model.l0_module.target_model={{{sizes}}}"'
    budgets = ("target_density", "target_parameters")
    if plan.target_speedup is not None:
        budgets = ("target_speedup",)
    others = "".join(f", {name}: null" for name in budgets)
    return f'"model.l0_module={{target_model: {{{sizes}}}{others}}}"'
