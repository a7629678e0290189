"""Scores of weights, chance and activations, by hand; planted useless structures go."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bge_pruning.models.structural_pruning import head_rows
from bge_pruning.selection.importance import (
    Importance,
    activation_importance,
    magnitude_importance,
    masks_of_importance,
    random_importance,
)


@torch.no_grad()
def shrink_structures(backbone, layer, head, unit, dimension, closed):
    """One head and one unit of a layer, one dimension, and one layer, all nearly without weight."""
    block = backbone.encoder.layer[layer]
    rows = head_rows([head], backbone.shape.head_dim)
    inner = block.attention.self
    for linear in (inner.query, inner.key, inner.value):
        linear.weight[rows] *= 0.01
        linear.bias[rows] *= 0.01
    block.attention.output.dense.weight[:, rows] *= 0.01
    block.intermediate.dense.weight[unit] *= 0.01
    block.intermediate.dense.bias[unit] *= 0.01
    block.output.dense.weight[:, unit] *= 0.01
    for block in backbone.encoder.layer:
        inner = block.attention.self
        for linear in (inner.query, inner.key, inner.value, block.intermediate.dense):
            linear.weight[:, dimension] *= 0.01
        for output in (block.attention.output, block.output):
            for module in (output.dense, output.LayerNorm):
                module.weight[dimension] *= 0.01
                module.bias[dimension] *= 0.01
    for parameter in backbone.encoder.layer[closed].parameters():
        parameter *= 0.01


def test_magnitudes_by_hand(build_model, tiny_shape):
    """All weights are 1, so a score is the root of the number of parameters that would go."""
    backbone, _ = build_model(tiny_shape)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(1.0)
    found = magnitude_importance(backbone)
    H, D, A, F, L = 32, 8, 4, 64, 4
    assert torch.allclose(found.head, torch.full((L, A), (4.0 * D * H + 3 * D) ** 0.5).double())
    assert torch.allclose(found.intermediate, torch.full((L, F), (2.0 * H + 1) ** 0.5).double())
    layer = A * (4 * D * H + 3 * D) + F * (2 * H + 1) + 6 * H
    assert torch.allclose(found.layer, torch.full((L,), layer**0.5).double())
    # Query, key, value, output, both projections of the units, and the six vectors of size H.
    hidden = L * (4 * A * D + 2 * F + 6)
    assert torch.allclose(found.hidden, torch.full((H,), hidden**0.5).double())


def test_planted_structures_without_weight_are_those_that_go(
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


def test_masks_have_the_shape_with_ties_by_index_and_chance_by_seed(tiny_shape, target_shape):
    masks = masks_of_importance(random_importance(tiny_shape, seed=1), target_shape)
    assert masks.head.sum(1).tolist() == [2] * 4
    assert masks.intermediate.sum(1).tolist() == [32] * 4
    assert (masks.layer.sum(), masks.hidden.sum()) == (2, 16)
    ones = Importance(torch.ones(4, 4), torch.ones(4, 64), torch.ones(4), torch.ones(32))
    masks = masks_of_importance(ones, target_shape)
    assert masks.layer.tolist() == [1, 1, 0, 0]
    assert masks.head.tolist() == [[1, 1, 0, 0]] * 4
    first, again, other = (
        masks_of_importance(random_importance(tiny_shape, seed), target_shape) for seed in (1, 1, 2)
    )
    assert torch.equal(first.intermediate, again.intermediate)
    assert not torch.equal(first.intermediate, other.intermediate)
    assert not torch.equal(first.intermediate[0], first.intermediate[1])
    scores = random_importance(tiny_shape, 0)
    scores.intermediate[2, 3] = float("nan")
    message = r"1 scores of importance of axis 'intermediate' are not finite.* To fix, use another"
    with pytest.raises(ValueError, match=message):
        masks_of_importance(scores, target_shape)


@pytest.fixture
def backbone(build_model, tiny_shape):
    return build_model(tiny_shape)[0]


def given(batch):
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def test_means_over_real_tokens_by_hand(backbone, batch):
    """One text after the other and without padding, by the formulas."""

    def norm(u, module):
        return F.layer_norm(u, (32,), module.weight, module.bias, 1e-5)

    heads, units, turns, hidden, tokens = [], [], [], [], 0
    for ids, mask in zip(*given(batch), strict=True):
        ids = ids[mask.bool()][None]
        tokens += ids.shape[1]
        ones = torch.ones_like(ids)
        packing = backbone._pack(ones, None)
        x = backbone.embeddings(ids, packing, None)
        norms = [x]
        row_heads, row_units, row_turns = [], [], []
        for layer in backbone.encoder.layer:
            context = layer.attention.self(x, packing)
            h = norm(layer.attention.output.dense(context) + x, layer.attention.output.LayerNorm)
            inner = F.gelu(layer.intermediate.dense(h))
            y = norm(layer.output.dense(inner) + h, layer.output.LayerNorm)
            row_heads.append(context.reshape(-1, 4, 8).square().sum(-1).sqrt().sum(0))
            row_units.append(inner.abs().sum(0))
            row_turns.append((1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).sum())
            norms += [h, y]
            x = y
        heads.append(torch.stack(row_heads))
        units.append(torch.stack(row_units))
        turns.append(torch.stack(row_turns))
        hidden.append(torch.stack(norms).abs().sum((0, 1)))
    found = activation_importance(backbone, [given(batch)])
    assert torch.allclose(found.head, sum(heads) / tokens)
    assert torch.allclose(found.intermediate, sum(units) / tokens)
    assert torch.allclose(found.layer, sum(turns) / tokens)
    assert torch.allclose(found.hidden, sum(hidden) / (9 * tokens))


def test_batches_and_padding_do_not_matter_and_the_model_is_left_as_it_was(backbone, batch):
    whole = activation_importance(backbone, [given(batch)])
    ids, mask = given(batch)
    parts = activation_importance(backbone, [(ids[:1], mask[:1]), (ids[1:, :7], mask[1:, :7])])
    for name in ("head", "intermediate", "layer", "hidden"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name)), name
    before = backbone(*given(batch))
    activation_importance(backbone, [given(batch)])
    assert torch.equal(backbone(*given(batch)), before)
    with pytest.raises(ValueError, match=r"there is no text to measure activations on\. To fix"):
        activation_importance(backbone, [])
    assert not any(module._forward_hooks for module in backbone.modules())


def test_planted_useless_structures_are_the_ones_that_go(backbone, batch, one_less_shape):
    with torch.no_grad():
        first, third = backbone.encoder.layer[1], backbone.encoder.layer[2]
        rows = head_rows([2], 8)
        first.attention.self.value.weight[rows] = 0.0
        first.attention.self.value.bias[rows] = 0.0
        first.intermediate.dense.weight[17] = 0.0
        first.intermediate.dense.bias[17] = 0.0
        # A layer that only normalises what is normalised already.
        for output in (third.attention.output, third.output):
            output.dense.weight.zero_()
            output.dense.bias.zero_()
            output.LayerNorm.weight.fill_(1.0)
            output.LayerNorm.bias.zero_()
    masks = masks_of_importance(activation_importance(backbone, [given(batch)]), one_less_shape)
    assert masks.head[1].tolist() == [1, 1, 0, 1]
    assert masks.intermediate[1].argmin() == 17
    assert masks.layer.tolist() == [1, 1, 0, 1]
