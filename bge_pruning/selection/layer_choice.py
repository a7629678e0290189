"""Chooses the layers to keep where only depth is pruned: the best subset, or every n-th."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb

import torch

from bge_pruning.models.encoder_shape import EncoderShape, layer_parameters
from bge_pruning.models.structural_pruning import PruningMasks

# All subsets are tried if there are at most this many.
MAX_SUBSETS = 300

# Computes the score of a model that keeps given layers; larger is better.
ScoreLayers = Callable[[Sequence[int]], float]


def layers_within(source: EncoderShape, budget: float) -> int:
    """Largest number of the source's layers whose parameters fit a budget."""
    one = layer_parameters(*source.layer_sizes)
    count = min(int(budget // one), source.num_hidden_layers)
    if count < 1:
        raise ValueError(
            f"a target of {budget:,.0f} encoder parameters is less than one whole layer of "
            f"{one:,}. To fix, choose a larger target, or a method that prunes widths too."
        )
    return count


def every_nth_layer(layers: int, keep: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them; a single one is the last."""
    if keep == 1:
        return [layers - 1]
    return [round(i * (layers - 1) / (keep - 1)) for i in range(keep)]


def best_layers(layers: int, keep: int, score: ScoreLayers) -> list[int]:
    """Find the layers with the best score, among all subsets if these are few, else greedily.

    The greedy search removes one layer after the other, each time the one without which the score
    is best. Of equal scores the first one counts.
    """
    if comb(layers, keep) <= MAX_SUBSETS:
        return list(max(combinations(range(layers), keep), key=score))
    kept = tuple(range(layers))
    while len(kept) > keep:
        kept = max(combinations(kept, len(kept) - 1), key=score)
    return list(kept)


def layer_masks(kept: Sequence[int], layers: int) -> PruningMasks:
    """Gates that are open for the kept layers and for everything in them."""
    gates = torch.zeros(layers)
    gates[list(kept)] = 1.0
    return PruningMasks(layer=gates)
