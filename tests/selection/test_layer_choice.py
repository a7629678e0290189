"""Which layers stay: by hand, and where the greedy search cannot be wrong."""

from dataclasses import replace
from itertools import combinations

import pytest

from bge_pruning.models.encoder_shape import count_parameters
from bge_pruning.selection import layer_choice


def test_every_nth_never_repeats_a_layer():
    assert layer_choice.every_nth_layer(6, 3) == [0, 2, 5]
    assert layer_choice.every_nth_layer(24, 12) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    for layers in range(1, 30):
        for keep in range(1, layers + 1):
            chosen = layer_choice.every_nth_layer(layers, keep)
            assert len(set(chosen)) == keep and chosen == sorted(chosen)
            assert chosen[-1] == layers - 1
            assert keep == 1 or chosen[0] == 0


def test_few_subsets_are_all_tried_and_many_are_searched_greedily():
    tried = []

    def score(kept):
        tried.append(tuple(kept))
        return 1.0 if tuple(kept) == (1, 4) else 0.0

    assert layer_choice.best_layers(6, 2, score) == [1, 4]
    assert sorted(tried) == list(combinations(range(6), 2))
    assert layer_choice.best_layers(4, 2, lambda kept: 0.0) == [0, 1]
    worth = [(7 * layer) % 24 for layer in range(24)]
    tried = []

    def score(kept):
        tried.append(tuple(kept))
        return sum(worth[layer] for layer in kept)

    found = layer_choice.best_layers(24, 18, score)
    assert found == sorted(sorted(range(24), key=lambda layer: -worth[layer])[:18])
    assert len(tried) == sum(range(19, 25))


def test_gates_of_kept_layers_and_layers_within_a_budget(tiny_shape):
    masks = layer_choice.layer_masks([0, 3], 4)
    assert masks.layer.tolist() == [1, 0, 0, 1]
    assert masks.head is masks.hidden is masks.intermediate is None
    whole = count_parameters(tiny_shape).encoder
    three = count_parameters(replace(tiny_shape, num_hidden_layers=3)).encoder
    budgets = (whole, whole / 2, whole / 2 - 1, 2 * whole, three)
    assert [layer_choice.layers_within(tiny_shape, budget) for budget in budgets] == [4, 2, 1, 4, 3]
    with pytest.raises(ValueError, match=r"a target of 10 .* is less than one whole layer of 8,5"):
        layer_choice.layers_within(tiny_shape, 10)
