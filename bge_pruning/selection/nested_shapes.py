"""Chooses several sizes from the gates of one run, each inside the next larger one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.shape_choice import MaskLikelihood, shapes_near_budget
from bge_pruning.models.structural_pruning import SHAPE_FIELDS, KeepIndices, PruningMasks

# A density this close to that of the run's target counts as the target's.
NEAR = 0.01
# Multiples of the intermediate size that are tried, one after the other.
GRANULARITIES = (64, 32, 16, 8)


def choose_nested_shapes(l0_module: L0Module, densities: Sequence[float]) -> list[EncoderShape]:
    """Choose a shape for each density, from large to small, each inside the one before.

    Among the exportable shapes near each budget, the nested ones are chosen that together agree
    best with the gates. The target shape of the run is kept for its own density.

    Raises:
        ValueError: If a density is not in (0, 1) or is repeated, or no nested shapes have them.
    """
    check_densities(densities)
    agreement = MaskLikelihood(l0_module.shape, l0_module.log_alpha)
    order = sorted(densities, reverse=True)
    for multiple_of in GRANULARITIES:
        candidates = [_candidates(l0_module, density, multiple_of) for density in order]
        if chain := _best_chain(candidates, agreement):
            return chain
    shares = ", ".join(f"{density:.1%}" for density in order)
    raise ValueError(
        f"no exportable shapes with {shares} of the encoder are inside each other. To fix, "
        f"choose other densities, or train with gates on more axes."
    )


def _best_chain(
    candidates: Sequence[Sequence[EncoderShape]], agreement: Callable[[EncoderShape], float]
) -> list[EncoderShape]:
    """Find the nested shapes, one of each list, with the largest sum of agreements."""
    # The sum and the shapes of the best chain that ends at each shape of a list.
    chains: list[tuple[float, list[EncoderShape]]] = [(0.0, [])]
    for shapes in candidates:
        longer = []
        for shape in shapes:
            before = [c for c in chains if not c[1] or _contains(c[1][-1], shape)]
            if before:
                total, chain = max(before, key=lambda c: c[0])
                longer.append((total + agreement(shape), [*chain, shape]))
        chains = longer
    return max(chains, key=lambda c: c[0])[1] if chains else []


def _candidates(l0_module: L0Module, density: float, multiple_of: int) -> list[EncoderShape]:
    source = l0_module.shape
    full = count_parameters(source).encoder

    def is_near(shape: EncoderShape) -> bool:
        return abs(count_parameters(shape).encoder / full - density) <= NEAR

    if l0_module.target is not None and is_near(l0_module.target):
        return [l0_module.target]
    axes = frozenset(l0_module.axes)
    near = shapes_near_budget(source, axes, density * full, multiple_of)
    return [shape for shape in near if is_near(shape)]


def check_densities(densities: Sequence[float]) -> None:
    """Refuse invalid densities of a family, before a training for it begins."""
    wrong = [density for density in densities if not 0 < density < 1]
    if wrong or not densities or len(set(densities)) < len(densities):
        raise ValueError(
            f"densities {list(densities)} are not different numbers in (0, 1). To fix, write e.g. "
            f"0.75 0.6 0.5."
        )


def _contains(large: EncoderShape, small: EncoderShape) -> bool:
    return all(getattr(large, field) >= getattr(small, field) for field in SHAPE_FIELDS.values())


def relative_indices(small: KeepIndices, large: KeepIndices) -> KeepIndices:
    """Find a smaller sub-network's structures within a larger one that is already cut.

    Both are in the numbering of the unpruned model, the result in that of the larger one.

    Raises:
        ValueError: If the larger one does not contain a structure.
    """
    rows = _positions(small.layer, large.layer, "layers")

    def inner(part: str) -> list[list[int]]:
        mine, theirs = getattr(small, part), getattr(large, part)
        return [
            _positions(kept, theirs[row], f"{part} of layer {layer}")
            for kept, row, layer in zip(mine, rows, small.layer, strict=True)
        ]

    hidden = _positions(small.hidden, large.hidden, "hidden dimensions")
    return KeepIndices(rows, hidden, inner("head"), inner("intermediate"))


def masks_of_indices(keep: KeepIndices, shape: EncoderShape) -> PruningMasks:
    """Binary gates, in the numbering of ``shape``, that keep the given structures."""
    masks = PruningMasks(**{axis: torch.zeros(size) for axis, size in shape.gate_shapes.items()})
    for row, layer in enumerate(keep.layer):
        masks.head[layer, keep.head[row]] = 1.0
        masks.intermediate[layer, keep.intermediate[row]] = 1.0
    masks.layer[keep.layer], masks.hidden[keep.hidden] = 1.0, 1.0
    return masks


def _positions(wanted: Sequence[int], among: Sequence[int], what: str) -> list[int]:
    place = {index: position for position, index in enumerate(among)}
    missing = [index for index in wanted if index not in place]
    if missing:
        raise ValueError(
            f"{what} {missing[:5]} are not in the larger model. To fix, cut both from the gates of "
            f"one run."
        )
    return [place[index] for index in wanted]
