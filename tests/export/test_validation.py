"""What extraction and export are judged by."""

import copy

import pytest
import torch

from bge_pruning.export.validation import in_float64


def test_a_model_computes_in_float64_and_is_what_it_was(build_model, tiny_shape, batch):
    backbone, heads = build_model(tiny_shape, dtype=torch.float32)
    heads.sparse_linear.bias.data.fill_(1.5)  # lifts weights above 0
    modules = torch.nn.ModuleList([backbone, heads])
    before = copy.deepcopy(modules.state_dict())
    twin = copy.deepcopy(modules).double()
    mask = batch["attention_mask"]

    def outputs(encoder, its_heads):
        hidden = encoder(batch["input_ids"], mask)
        return {"hidden": hidden, **its_heads.outputs(hidden, mask)}

    with torch.no_grad():
        plain, expected = outputs(backbone, heads), outputs(*twin)
        with in_float64(backbone, heads):
            found = outputs(backbone, heads)
        again = outputs(backbone, heads)
    for name, value in expected.items():
        assert value.dtype == found[name].dtype == torch.float64
        assert (found[name] - value).abs().max() < 1e-14 < (plain[name] - value).abs().max()
        assert torch.equal(again[name], plain[name])
    with pytest.raises(ZeroDivisionError), in_float64(backbone, heads):
        _ = 1 / 0
    after = modules.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {value.dtype for value in after.values()} == {torch.float32}
