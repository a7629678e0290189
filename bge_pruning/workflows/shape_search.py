"""Find which of the shapes that meet a budget keeps most, by cutting and refitting, not training.

The distance of a cut model, refitted by least squares, from the whole one ranked six shapes of the
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

from bge_pruning.config.command_checks import check_search
from bge_pruning.config.load import Config, ConfigError
from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.evaluation.statistics import cosine_error, error_difference
from bge_pruning.model_io.checkpoint import cut
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
from bge_pruning.selection.sensitivity import weigh_tokens
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.calibration import calibration_texts, pad_batches
from bge_pruning.training.plan import Plan, fetch_plan
from bge_pruning.utils.embedding_metrics import is_flat
from bge_pruning.utils.environment import collect_versions, torch_device

log = logging.getLogger(__name__)
# Number of texts that shapes are judged on, if that many are left beside those for fitting.
JUDGED_TEXTS = 256
# With fewer texts the best shape would be a matter of chance.
FEWEST_JUDGED = 16


@dataclass(frozen=True)
class MeasuredShape:
    """Distance of a cut and fitted model from the whole one, on texts not used for fitting.

    Attributes:
        layers: The source's layers that it keeps.
        cosine_error: Error of dense vectors, see :func:`cosine_error`.
        above_best: 95 % interval, over texts, of its error minus that of the best shape.
        multi_vector_error: One minus the mean cosine of multi-vectors with the source's; ``None``
            without such a head.
    """

    shape: EncoderShape
    layers: tuple[int, ...]
    cosine_error: float
    above_best: tuple[float, float]
    multi_vector_error: float | None
    seconds: float


@dataclass(frozen=True)
class ShapeSearch:
    """The result of a search; of the ``measured`` shapes the best is the first.

    ``candidates`` is the number of shapes that meet the budget, ``train`` the names of the sources
    of texts, and the target of the ``plan`` is that of the configuration.
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
        """Return ``key=value`` that makes the best shape the target of the configuration."""
        # All sizes are named, since sizes that only the configuration names would stay.
        shape, pruned = self.measured[0].shape, SHAPE_FIELDS.values()
        sizes = ", ".join(f"{n}: {getattr(shape, f)}" for f, n in YAML_NAMES.items() if f in pruned)
        if self.plan.target is not None:
            return f"model.l0_module.target_model={{{sizes}}}"
        unset = "target_density: null, target_parameters: null"
        if self.plan.target_speedup is not None:
            unset = "target_speedup: null"
        return f"model.l0_module={{target_model: {{{sizes}}}, {unset}}}"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        found = {**asdict(self), "override": self.override, "versions": collect_versions()}
        plan = found.pop("plan")
        kept = ("target", "target_parameters", "target_speedup", "target_length")
        return {**found, **{key: plan[key] for key in kept}}


def search_shapes(config: Config, every: bool = False) -> ShapeSearch:
    """Measure the shapes that meet the budget of a configuration.

    Heads and units go in the order of :func:`reconstruction_importance`, measured on the
    ``baseline.calibration_texts`` training texts to which each cut model is then fitted. A target
    shape counts as its number of parameters. Unless ``every`` shape is wanted, those are measured
    that :func:`best_shape` asks for.

    Raises:
        ConfigError: If there is no target or no training data, or the target cannot be reached.
        OSError: If the model cannot be loaded.
        ValueError: If the training data have too few texts.
    """
    check_search(config)
    plan = fetch_plan(config)
    base = build_base_model(config)
    candidates = find_candidates(config, plan, base.shape)
    judge = _Judge(config, base)
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
        fitted_texts=judge.fitted,
        judged_texts=judge.judged,
        seed=config.seed,
        measured=judge.ranked(config.seed),
    )


def find_candidates(config: Config, plan: Plan, source: EncoderShape) -> list[EncoderShape]:
    """Return the shapes to choose from; a target shape replaces the one of its layers and heads.

    Raises:
        ConfigError: If only the source itself meets the budget.
    """
    parameters = plan.target_parameters
    if plan.target is not None:
        parameters = float(count_parameters(plan.target).encoder)
    axes = tuple(axis for axis in AXES if axis in config.model.l0_module.pruning_modules)
    budget = (parameters, plan.target_speedup, plan.target_length)
    shapes = shapes_of_budget(plan.source, axes, *budget)
    found = {(s.num_hidden_layers, s.num_attention_heads): s for s in shapes}
    if plan.target is not None:
        found[plan.target.num_hidden_layers, plan.target.num_attention_heads] = plan.target
    # Embeddings and heads are those of the loaded weights.
    sizes = [{f: getattr(shape, f) for f in SHAPE_FIELDS.values()} for shape in found.values()]
    smaller = [shape for size in sizes if (shape := replace(source, **size)) != source]
    if not smaller:
        raise ConfigError(
            "only the model as it is meets the target of model.l0_module: there is nothing to "
            "prune. To fix, choose a smaller target."
        )
    return smaller


def split_texts(texts: TokenizedTexts, wanted: int) -> tuple[list[int], list[int]]:
    """Return the texts to fit to and the texts to judge on, without a common text.

    If there are few, a third of them is judged on. The texts, in random order, may occur twice.

    Raises:
        ValueError: If fewer than ``FEWEST_JUDGED`` texts are left to judge on.
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
    """Cuts, fits and measures shapes of ``base``, which is moved to the run's device.

    Raises:
        ValueError: If there are too few texts, or the unpruned model gives all pairs of them the
            same cosine.
    """

    def __init__(self, config: Config, base: BaseModel) -> None:
        device, wanted = torch_device(config.device), config.baseline.calibration_texts
        texts = calibration_texts(config, base, wanted + JUDGED_TEXTS)
        fitted, judged = split_texts(texts, wanted)
        self.fitted, self.judged = len(fitted), len(judged)
        fit = list(pad_batches(texts, fitted, config, base, device))
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
        given = (self.source, self.heads, fit, config.seed)
        self.importance, self.fit = reconstruction_importance(*given), weigh_tokens(*given)
        self.measured: dict[EncoderShape, MeasuredShape] = {}
        self.cosines: dict[EncoderShape, np.ndarray] = {}

    @torch.no_grad()
    def error(self, shape: EncoderShape) -> float:
        """Measure the error of the cosines of a shape."""
        started = time.monotonic()
        keep = self.source.keep_indices(masks_of_importance(self.importance, shape))
        # Embeddings need no copy: cutting replaces their tables, and fitting leaves them alone.
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
        seconds, layers = time.monotonic() - started, tuple(keep.layer)
        self.measured[shape] = MeasuredShape(shape, layers, error, (0.0, 0.0), multi, seconds)
        log.info("%s: error of cosines %.4f, %.0f s", shape.describe(), error, seconds)
        return error

    def ranked(self, seed: int) -> tuple[MeasuredShape, ...]:
        """Return the measured shapes, the best first, and compare the others with it."""
        best, *others = sorted(self.measured.values(), key=lambda m: m.cosine_error)
        pairs = [(self.cosines[m.shape], self.cosines[best.shape]) for m in others]
        above = [error_difference(*pair, self.wanted_cosines, seed) for pair in pairs]
        return (best, *(replace(m, above_best=a) for m, a in zip(others, above, strict=True)))

    @torch.no_grad()
    def _outputs(self, backbone: torch.nn.Module, heads: torch.nn.Module) -> dict[str, Tensor]:
        """Embed the texts to judge on: dense vectors ``(N, H)``, multi-vectors ``(tokens, C)``."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for ids, mask in self.test:
            outputs = compute_outputs(backbone, heads, ids, mask, self.names)
            found["dense_vecs"].append(outputs["dense_vecs"].float().cpu())
            if "colbert_vecs" in self.names:
                vectors = outputs["colbert_vecs"][mask[:, 1:].bool()]
                found["colbert_vecs"].append(vectors.float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}


def _cosines(outputs: dict[str, Tensor]) -> np.ndarray:
    """Return the cosines of all pairs of texts, shape ``(N, N)``."""
    vectors = outputs["dense_vecs"]
    return (vectors @ vectors.T).numpy()


def search_rows(search: ShapeSearch) -> tuple[list[str], list[list[str]]]:
    """Return a table of the measured shapes, the best first: its header and its cells."""
    length = search.plan.target_length
    full, flops = count_parameters(search.source).encoder, forward_flops(search.source, [length])
    header = ["keeps layers", "layers", "hidden", "heads", "units", "encoder"]
    header += [f"speed-up at {length}", "error of cosines", "above the best", "of multi-vectors"]

    def row(index: int, m: MeasuredShape) -> list[str]:
        s, multi, (low, high) = m.shape, m.multi_vector_error, m.above_best
        sizes = (s.num_hidden_layers, s.hidden_size, s.num_attention_heads, s.intermediate_size)
        share, speedup = count_parameters(s).encoder / full, flops / forward_flops(s, [length])
        cells = [render_spans(m.layers), *map(str, sizes), f"{share:.1%}", f"{speedup:.2f}"]
        above = f"{low:.4f} to {high:.4f}" if index else ""
        return [*cells, f"{m.cosine_error:.4f}", above, "none" if multi is None else f"{multi:.4f}"]

    return header, [row(index, m) for index, m in enumerate(search.measured)]


def render_spans(layers: Sequence[int]) -> str:
    """Render ascending numbers with runs shortened, such as ``0, 2-5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def summarise(search: ShapeSearch) -> str:
    """Say what was measured, how many shapes may be as good as the best, and its override."""
    ties = sum(m.above_best[0] <= 0 for m in search.measured[1:])
    told = f"{ties} of the others may be as good" if ties else "the others are worse"
    return (
        f"{len(search.measured)} of {search.candidates} shapes measured, fitted to "
        f"{search.fitted_texts:,} texts and judged on {search.judged_texts} others; none was "
        f"trained.\nThe best of them ({told}, by 95 % intervals over the texts):\n"
        f'"{search.override}"'
    )
