"""Three ways to attend, one result: groups of equal length, any lengths at once, padding masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bge_pruning.models import packing as attention
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.packing import (
    Packing,
    attend,
    compute_packing,
    keep_padding,
    varlen_applies,
)
from bge_pruning.models.structural_pruning import PruningMasks
from bge_pruning.models.teacher import HIDDEN, compute_outputs

LENGTHS = [3, 7, 1, 7, 0, 5]
MASK = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).long()
Layout = Callable[[XLMRobertaBackbone], XLMRobertaBackbone]
LAYOUTS = ["groups", "varlen", "padded"]


@pytest.fixture
def layout(
    request, monkeypatch, attend_within_texts
) -> Callable[[XLMRobertaBackbone], XLMRobertaBackbone]:
    """Makes a model compute in one of the layouts."""
    monkeypatch.setattr(attention, "varlen_attn", attend_within_texts)
    monkeypatch.setattr(
        "bge_pruning.models.bge_m3_backbone.varlen_applies", lambda *_: request.param == "varlen"
    )

    def apply(backbone: XLMRobertaBackbone) -> XLMRobertaBackbone:
        backbone.compiled_for = backbone.training if request.param == "padded" else None
        return backbone

    return apply


def packing_of(name: str) -> Packing:
    return (
        keep_padding(MASK) if name == "padded" else compute_packing(MASK, varlen=name == "varlen")
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_text_attends_to_itself(name, monkeypatch, attend_within_texts):
    monkeypatch.setattr(attention, "varlen_attn", attend_within_texts)
    generator = torch.Generator().manual_seed(0)
    padded = torch.randn(3, *MASK.shape, 2, 4, generator=generator, dtype=torch.float64)
    packing = packing_of(name)
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
    """Soft gates that gradients flow to."""
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


def test_lengths_of_the_host_are_those_of_the_mask():
    known, counted = compute_packing(MASK, LENGTHS), compute_packing(MASK)
    assert torch.equal(known.index, counted.index)
    assert known.groups == counted.groups == ((1, 1), (1, 3), (1, 5), (2, 7))
