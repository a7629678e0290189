"""Activations against loops over the hidden states; planted useless structures are found."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bge_pruning.models.structural_pruning import head_rows
from bge_pruning.selection.importance import activation_importance, masks_of_importance


@pytest.fixture
def backbone(build_model, tiny_shape):
    return build_model(tiny_shape)[0]


def given(batch):
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def test_means_over_real_tokens_by_hand(backbone, batch):
    """One text after the other and without padding, by the formulas."""
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
            h = F.layer_norm(
                layer.attention.output.dense(context) + x,
                (32,),
                layer.attention.output.LayerNorm.weight,
                layer.attention.output.LayerNorm.bias,
                1e-5,
            )
            inner = F.gelu(layer.intermediate.dense(h))
            y = F.layer_norm(
                layer.output.dense(inner) + h,
                (32,),
                layer.output.LayerNorm.weight,
                layer.output.LayerNorm.bias,
                1e-5,
            )
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


def test_batches_and_padding_do_not_matter(backbone, batch):
    whole = activation_importance(backbone, [given(batch)])
    ids, mask = given(batch)
    parts = activation_importance(backbone, [(ids[:1], mask[:1]), (ids[1:, :7], mask[1:, :7])])
    for name in ("head", "intermediate", "layer", "hidden"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name)), name


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


def test_a_silent_dimension_goes(backbone, batch):
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "LayerNorm" in name:
                parameter[5] = 0.0
    found = activation_importance(backbone, [given(batch)])
    assert found.hidden[5] == 0
    assert (found.hidden[torch.arange(32) != 5] > 0).all()


def test_the_model_is_left_as_it_was(backbone, batch):
    before = backbone(*given(batch))
    activation_importance(backbone, [given(batch)])
    assert torch.equal(backbone(*given(batch)), before)
    assert not any(module._forward_hooks for module in backbone.modules())


def test_no_text_is_an_error(backbone):
    with pytest.raises(ValueError, match=r"there is no text to measure activations on\. To fix"):
        activation_importance(backbone, [])
