"""Packed tokens and attention over them: what the encoder computes of padded texts, three ways."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bge_pruning.models import packing as attention
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.packing import attend, compute_packing, keep_padding, varlen_applies
from bge_pruning.models.structural_pruning import PruningMasks
from bge_pruning.models.teacher import HIDDEN, compute_outputs

LENGTHS = [3, 7, 1, 7, 0, 5]
MASK = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()
Layout = Callable[[XLMRobertaBackbone], XLMRobertaBackbone]
LAYOUTS = ["groups", "varlen", "padded"]


def mask_of(*lengths: int, width: int = 0) -> Tensor:
    width = width or max(lengths)
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    "mask",
    [
        mask_of(3, 1, 3, 2),
        mask_of(4, 4),
        mask_of(0, 2, 0),
        mask_of(2, 5, width=7),
        torch.tensor([[1, 0, 1], [0, 1, 1]]),
    ],
    ids=["mixed", "full", "empty rows", "wide", "holes"],
)
def test_unpacking_gives_the_real_tokens_back_and_their_gradients(mask):
    packing = compute_packing(mask)
    values = torch.randn(*mask.shape, 5, requires_grad=True)
    packed = packing.pack(values)
    assert packed.shape == (int(mask.sum()), 5)
    assert sum(packing.group_tokens) == len(packed)
    back = packing.unpack(packed)
    assert torch.equal(back, values * mask[..., None])
    back.sum().backward()
    assert torch.equal(values.grad, mask[..., None].expand_as(values).float())


def test_groups_shares_and_batches_without_texts_or_padding():
    mask = mask_of(3, 1, 3, 2, 1)
    packing = compute_packing(mask)
    assert packing.groups == ((2, 1), (1, 2), (2, 3))
    texts = torch.arange(5)[:, None].expand(5, 3)
    parts = packing.pack(texts).split(packing.group_tokens)
    assert [part.tolist() for part in parts] == [[1, 4], [3, 3], [0, 0, 0, 2, 2, 2]]
    packing = compute_packing(torch.ones(3, 4))
    values = torch.randn(3, 4, 2)
    assert packing.index is None and packing.groups == ((3, 4),)
    assert packing.pack(values).data_ptr() == values.data_ptr()
    packing = compute_packing(torch.zeros(3, 4))
    packed = packing.pack(values)
    assert packed.shape == (0, 2)
    assert torch.equal(packing.unpack(packed), torch.zeros(3, 4, 2))
    known, counted = compute_packing(MASK, LENGTHS), compute_packing(MASK)
    assert torch.equal(known.index, counted.index)
    assert known.groups == counted.groups == ((1, 1), (1, 3), (1, 5), (2, 7))


def test_a_text_does_not_depend_on_the_texts_beside_it(build_model, tiny_shape, batch):
    """Packed with others, padded with others, or alone: the same hidden states and gradients."""
    backbone, _ = build_model(tiny_shape)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    lengths = mask.sum(1).tolist()

    def run(rows: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        backbone.zero_grad()
        states = [backbone(*row) for row in rows]
        for state, (_, real) in zip(states, rows, strict=True):
            (state.sin() * real[..., None]).sum().backward()
        grads = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
        return states, grads

    (together,), expected = run([(ids, mask)])
    texts = [(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)]
    alone, found = run(texts)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row, :length], alone[row][0], atol=1e-12, rtol=0)
        assert not together[row, length:].any()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-10, rtol=1e-8)


@pytest.fixture
def layout(request, monkeypatch, attend_within_texts) -> Layout:
    monkeypatch.setattr(attention, "varlen_attn", attend_within_texts)
    varlen = request.param == "varlen"
    monkeypatch.setattr("bge_pruning.models.bge_m3_backbone.varlen_applies", lambda *_: varlen)

    def apply(backbone: XLMRobertaBackbone) -> XLMRobertaBackbone:
        backbone.compiled_for = backbone.training if request.param == "padded" else None
        return backbone

    return apply


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_text_attends_to_itself(name, monkeypatch, attend_within_texts):
    monkeypatch.setattr(attention, "varlen_attn", attend_within_texts)
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(3, *MASK.shape, 2, 4, generator=generator, dtype=torch.float64)
    padded_too = name == "padded"
    packing = keep_padding(MASK) if padded_too else compute_packing(MASK, varlen=name == "varlen")
    found = packing.unpack(attend(*(packing.pack(x) for x in padded), packing, 0.0))
    for row, length in enumerate(LENGTHS):
        one = [x[row, :length].transpose(0, 1)[None] for x in padded]
        expected = F.scaled_dot_product_attention(*one)[0].transpose(0, 1)
        torch.testing.assert_close(found[row, :length], expected, atol=1e-12, rtol=0)
        assert not found[row, length:].any()


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("gated", [False, True], ids=["open", "gated"])
def test_outputs_and_gradients_are_the_same_in_every_layout(layout, gated, build_model, tiny_shape):
    def run(backbone: XLMRobertaBackbone) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        masks, gates = gates_of(tiny_shape) if gated else (None, [])
        names = [*heads.names(), HIDDEN]
        outputs = compute_outputs(backbone, heads, ids, MASK, names, masks, LENGTHS)
        sum((value.sin() * (i + 1)).sum() for i, value in enumerate(outputs.values())).backward()
        named = [*backbone.named_parameters(), *heads.named_parameters()]
        grads = {n: p.grad.clone() for n, p in named if p.grad is not None}
        backbone.zero_grad()
        heads.zero_grad()
        return outputs, grads | {f"gate {i}": z.grad for i, z in enumerate(gates)}

    backbone, heads = build_model(tiny_shape)
    ids = torch.randint(4, 99, MASK.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.where(MASK.bool(), ids, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bge_pruning.models.bge_m3_backbone.varlen_applies", lambda *_: False)
        expected = run(backbone)
    found = run(layout(backbone))
    for values, wanted in zip(found, expected, strict=True):
        assert values.keys() == wanted.keys()
        for name, value in values.items():
            torch.testing.assert_close(value, wanted[name], atol=1e-9, rtol=1e-9, msg=name)


def gates_of(shape) -> tuple[PruningMasks, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    layers, heads = shape.num_hidden_layers, shape.num_attention_heads
    sizes = [(layers, heads), (layers, shape.intermediate_size), (layers,), (shape.hidden_size,)]
    gates = [
        torch.rand(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]
    return PruningMasks(*gates), gates


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cuda", torch.bfloat16, 64, True),
        ("cuda", torch.float16, 32, True),
        ("cuda", torch.float32, 64, False),
        ("cuda", torch.bfloat16, 12, False),
        ("cuda", torch.bfloat16, 512, False),
        ("cpu", torch.bfloat16, 64, False),
    ],
)
def test_where_the_kernel_for_any_lengths_applies(device, dtype, head_dim, expected, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", attend)
    assert varlen_applies(torch.device(device), dtype, head_dim) is expected
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert not varlen_applies(torch.device(device), dtype, head_dim)


@pytest.mark.parametrize("layout", ["varlen"], indirect=True)
def test_dropout_keeps_to_the_groups(layout, build_model, tiny_shape):
    """The kernel for any lengths has no dropout."""
    backbone = layout(build_model(tiny_shape, dropout=0.1)[0])
    assert backbone._pack(MASK, LENGTHS).boundaries is not None
    assert backbone.train()._pack(MASK, LENGTHS).boundaries is None
