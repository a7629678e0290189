"""Packed tokens: nothing is lost, and the encoder computes what it computes of padded texts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bge_pruning.models.packing import compute_packing


def mask_of(*lengths: int, width: int = 0) -> Tensor:
    width = width or max(lengths)
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    "mask",
    [
        mask_of(3, 1, 3, 2),
        mask_of(4, 4),
        mask_of(0, 2, 0),
        mask_of(1),
        mask_of(2, 5, width=7),
        torch.tensor([[1, 0, 1], [0, 1, 1]]),
    ],
    ids=["mixed", "full", "empty rows", "one token", "wide", "holes"],
)
def test_unpacking_gives_the_real_tokens_back(mask):
    packing = compute_packing(mask)
    values = torch.randn(*mask.shape, 5)
    packed = packing.pack(values)
    assert packed.shape == (int(mask.sum()), 5)
    assert torch.equal(packing.unpack(packed), values * mask[..., None])
    assert sum(packing.group_tokens) == len(packed)


def test_texts_of_a_group_have_its_length():
    mask = mask_of(3, 1, 3, 2, 1)
    packing = compute_packing(mask)
    assert packing.groups == ((2, 1), (1, 2), (2, 3))
    texts = torch.arange(5)[:, None].expand(5, 3)
    parts = packing.pack(texts).split(packing.group_tokens)
    assert [part.tolist() for part in parts] == [[1, 4], [3, 3], [0, 0, 0, 2, 2, 2]]


def test_a_batch_without_padding_stays_as_it_is():
    packing = compute_packing(torch.ones(3, 4))
    values = torch.randn(3, 4, 2)
    assert packing.index is None
    assert packing.groups == ((3, 4),)
    assert packing.pack(values).data_ptr() == values.data_ptr()


def test_nothing_but_padding():
    packing = compute_packing(torch.zeros(2, 3))
    packed = packing.pack(torch.randn(2, 3, 4))
    assert packed.shape == (0, 4)
    assert torch.equal(packing.unpack(packed), torch.zeros(2, 3, 4))


def test_gradients_reach_the_real_tokens_alone():
    mask = mask_of(3, 1, 2)
    packing = compute_packing(mask)
    values = torch.randn(3, 3, 4, requires_grad=True)
    packing.unpack(packing.pack(values) * 2.0).sum().backward()
    assert torch.equal(values.grad, 2.0 * mask[..., None].expand_as(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_text_does_not_depend_on_the_texts_beside_it(dtype, build_model, tiny_shape, batch):
    """Packed with others, padded with others, or alone: the same hidden states and gradients."""
    backbone, _ = build_model(tiny_shape, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    ids, mask = batch["input_ids"], batch["attention_mask"]
    together = backbone(ids, mask)
    for row, (text, real) in enumerate(zip(ids, mask, strict=True)):
        length = int(real.sum())
        alone = backbone(text[None, :length], real[None, :length])[0]
        torch.testing.assert_close(together[row, :length], alone, atol=tolerance, rtol=0)
        assert not together[row, length:].any()


def test_gradients_are_those_of_the_texts_alone(build_model, tiny_shape, batch):
    backbone, _ = build_model(tiny_shape)
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def gradients(rows: list[Tensor]) -> dict[str, Tensor]:
        backbone.zero_grad()
        for ids_of, mask_of_ in rows:
            (backbone(ids_of, mask_of_).sin() * mask_of_[..., None]).sum().backward()
        return {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}

    together = gradients([(ids, mask)])
    lengths = mask.sum(1).tolist()
    alone = gradients([(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)])
    assert together.keys() == alone.keys()
    for name, value in together.items():
        torch.testing.assert_close(value, alone[name], atol=1e-10, rtol=1e-8)


def test_shares_of_a_text_make_one_in_the_order_of_packed_tokens():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    packing = compute_packing(mask)
    shares = packing.unpack(packing.shares()[:, None])[..., 0]
    torch.testing.assert_close(shares, mask / mask.sum(1, keepdim=True))
    whole = compute_packing(mask[2:])
    assert whole.shares().tolist() == [0.25] * 4
