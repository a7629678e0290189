"""Scores of weights and of chance, by hand; planted useless structures are the ones that go."""

import pytest
import torch

from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.structural_pruning import head_rows
from bge_pruning.selection.importance import (
    Importance,
    magnitude_importance,
    masks_of_importance,
    random_importance,
)


def fill(backbone, value=1.0):
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(value)


@torch.no_grad()
def shrink_structures(backbone, layer, head, unit, dimension, closed):
    """One head and one unit of a layer, one dimension, and one layer, all nearly without weight."""
    dim = backbone.shape.head_dim
    block = backbone.encoder.layer[layer]
    rows = head_rows([head], dim)
    for linear in (
        block.attention.self.query,
        block.attention.self.key,
        block.attention.self.value,
    ):
        linear.weight[rows] *= 0.01
        linear.bias[rows] *= 0.01
    block.attention.output.dense.weight[:, rows] *= 0.01
    block.intermediate.dense.weight[unit] *= 0.01
    block.intermediate.dense.bias[unit] *= 0.01
    block.output.dense.weight[:, unit] *= 0.01
    for block in backbone.encoder.layer:
        wide = (block.attention.self.query, block.attention.self.key, block.attention.self.value)
        for linear in (*wide, block.intermediate.dense):
            linear.weight[:, dimension] *= 0.01
        for output in (block.attention.output, block.output):
            output.dense.weight[dimension] *= 0.01
            output.dense.bias[dimension] *= 0.01
            output.LayerNorm.weight[dimension] *= 0.01
            output.LayerNorm.bias[dimension] *= 0.01
    for parameter in backbone.encoder.layer[closed].parameters():
        parameter *= 0.01


def test_magnitudes_by_hand(build_model, tiny_shape):
    """All weights are 1, so a score is the root of the number of parameters that would go."""
    backbone, _ = build_model(tiny_shape)
    fill(backbone)
    found = magnitude_importance(backbone)
    H, D, A, F, L = 32, 8, 4, 64, 4
    assert torch.allclose(found.head, torch.full((L, A), (4.0 * D * H + 3 * D) ** 0.5).double())
    assert torch.allclose(found.intermediate, torch.full((L, F), (2.0 * H + 1) ** 0.5).double())
    layer = A * (4 * D * H + 3 * D) + F * (2 * H + 1) + 6 * H
    assert torch.allclose(found.layer, torch.full((L,), layer**0.5).double())
    # Query, key, value, output, both projections of the units, and the six vectors of size H.
    hidden = L * (4 * A * D + 2 * F + 6)
    assert torch.allclose(found.hidden, torch.full((H,), hidden**0.5).double())


def test_planted_structures_without_weight_are_the_ones_that_go(
    build_model, tiny_shape, one_less_shape
):
    backbone, _ = build_model(tiny_shape)
    shrink_structures(backbone, layer=1, head=2, unit=17, dimension=5, closed=3)
    masks = masks_of_importance(magnitude_importance(backbone), one_less_shape)
    assert masks.head[1].tolist() == [1, 1, 0, 1]
    assert masks.intermediate[1].argmin() == 17
    assert masks.layer.tolist() == [1, 1, 1, 0]
    assert masks.hidden.argmin() == 5
    assert masks.is_binary()


def test_masks_have_the_shape(tiny_shape, target_shape):
    masks = masks_of_importance(random_importance(tiny_shape, seed=1), target_shape)
    assert masks.head.sum(1).tolist() == [2] * 4
    assert masks.intermediate.sum(1).tolist() == [32] * 4
    assert (masks.layer.sum(), masks.hidden.sum()) == (2, 16)


def test_ties_go_to_the_lower_index(tiny_shape, target_shape):
    ones = Importance(torch.ones(4, 4), torch.ones(4, 64), torch.ones(4), torch.ones(32))
    masks = masks_of_importance(ones, target_shape)
    assert masks.layer.tolist() == [1, 1, 0, 0]
    assert masks.head.tolist() == [[1, 1, 0, 0]] * 4


def test_chance_is_seeded_and_differs_between_seeds_and_layers(tiny_shape, target_shape):
    first, again, other = (
        masks_of_importance(random_importance(tiny_shape, seed), target_shape) for seed in (1, 1, 2)
    )
    assert torch.equal(first.intermediate, again.intermediate)
    assert not torch.equal(first.intermediate, other.intermediate)
    assert not torch.equal(first.intermediate[0], first.intermediate[1])


def test_scores_that_are_no_numbers_are_refused(tiny_shape, target_shape):
    scores = random_importance(tiny_shape, 0)
    scores.intermediate[2, 3] = float("nan")
    message = r"1 scores of importance of axis 'intermediate' are not finite.* To fix, use another"
    with pytest.raises(ValueError, match=message):
        masks_of_importance(scores, target_shape)


def test_masked_equals_extracted(build_model, tiny_shape, target_shape, batch):
    backbone, heads = build_model(tiny_shape)
    masks = masks_of_importance(magnitude_importance(backbone), target_shape)
    given = (batch["input_ids"], batch["attention_mask"])
    expected = heads.outputs(backbone(*given, masks), given[1])
    keep = backbone.keep_indices(masks)
    expected["dense_vecs"] = expected["dense_vecs"][:, keep.hidden]
    backbone.prune(keep)
    heads.prune(keep.hidden)
    assert isinstance(heads, EmbeddingHeads)
    found = heads.outputs(backbone(*given), given[1])
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name
