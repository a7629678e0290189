"""The law: masked == extracted; and all gates open == Hugging Face's XLMRobertaModel."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bge_pruning.model_io.checkpoint import cut
from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.encoder_shape import count_parameters, expected_parameters
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS, PruningMasks

L, A, H, F = 4, 4, 32, 64
ROWS = {"head": (L, A), "hidden": (1, H), "intermediate": (L, F), "layer": (1, L)}
fast = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def bits(value: int, size: int) -> list[float]:
    return [float(value >> i & 1) for i in range(size)]


@st.composite
def gates(draw: st.DrawFn, axes: tuple[str, ...]) -> dict[str, Tensor]:
    """Binary gates; a layer may have no head or unit left, the model at least 1 layer and dim."""
    result = {}
    for axis in axes:
        rows, size = ROWS[axis]
        lowest = 1 if axis in ("hidden", "layer") else 0
        some = st.integers(lowest, 2**size - 1)
        values = [draw(st.one_of(st.just(lowest), some)) for _ in range(rows)]
        z = torch.tensor([bits(value, size) for value in values])
        result[axis] = z if axis in ("head", "intermediate") else z[0]
    return result


def random_gates(axes: tuple[str, ...], seed: int, soft: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"head": (L, A), "hidden": (H,), "intermediate": (L, F), "layer": (L,)}
    z = {axis: torch.rand(shapes[axis], generator=generator) for axis in axes}
    return z if soft else {axis: (value > 0.4).float() for axis, value in z.items()}


def real_parameters(module: nn.Module, prefix: str) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if n.startswith(prefix))


def hugging_face(config: dict[str, Any], **changes: Any) -> nn.Module:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    return XLMRobertaModel(XLMRobertaConfig(**{**config, **changes})).double().eval()


@pytest.mark.parametrize("ones", [False, True], ids=["no-masks", "all-ones"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_open_gates_are_hugging_face(
    build_model, tiny_shape, tiny_hf_config, batch, ones, implementation
):
    theirs = hugging_face(tiny_hf_config, attn_implementation=implementation)
    ours, _ = build_model(tiny_shape)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    masks = {axis: torch.ones_like(z).double() for axis, z in random_gates(AXES, 0).items()}
    with torch.no_grad():
        mine = ours(**batch, masks=PruningMasks(**masks) if ones else None)
        expected = theirs(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(mine[real], expected[real], atol=1e-10, rtol=0)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_eps_and_pad_id_are_used(tiny_shape, tiny_hf_config, batch, eps):
    theirs = hugging_face(tiny_hf_config, layer_norm_eps=eps, pad_token_id=5)
    ours = XLMRobertaBackbone(tiny_shape, pad_token_id=5, layer_norm_eps=eps).double().eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.where(batch["input_ids"] == 1, 5, batch["input_ids"].clamp(min=6))
    mask = ids.ne(5).long()
    with torch.no_grad():
        mine, expected = ours(ids, mask), theirs(ids, mask).last_hidden_state
    torch.testing.assert_close(mine[mask.bool()], expected[mask.bool()], atol=1e-10, rtol=0)


@pytest.mark.parametrize("pooler", [True, False])
def test_state_dicts_are_exchanged_with_hugging_face(tiny_shape, tiny_hf_config, pooler):
    from transformers import XLMRobertaConfig, XLMRobertaModel

    theirs = XLMRobertaModel(XLMRobertaConfig(**tiny_hf_config), add_pooling_layer=pooler)
    ours = XLMRobertaBackbone(replace(tiny_shape, pooler=pooler))
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_masked_equals_extracted(build_model, tiny_shape, batch, axes, dtype, atol):
    models = {p: build_model(tiny_shape, dtype, pooling=p) for p in ("cls", "mean")}
    attention_mask = batch["attention_mask"]

    @fast
    @given(z=gates(axes), pooling=st.sampled_from(["cls", "mean"]))
    def check(z: dict[str, Tensor], pooling: str) -> None:
        backbone, heads = copy.deepcopy(models[pooling])
        masks = PruningMasks(**{axis: value.to(dtype) for axis, value in z.items()})
        keep = backbone.keep_indices(masks)
        with torch.no_grad():
            hidden = backbone(**batch, masks=masks)
            masked = heads.outputs(hidden, attention_mask)
            cut(backbone, heads, keep)
            small_hidden = backbone(**batch)
            extracted = heads.outputs(small_hidden, attention_mask)
        assert set(extracted) == {"dense_vecs", "token_weights", "colbert_vecs"}
        masked["dense_vecs"] = masked["dense_vecs"][:, keep.hidden]
        masked["hidden"], extracted["hidden"] = hidden[..., keep.hidden], small_hidden
        for name, value in extracted.items():
            torch.testing.assert_close(value, masked[name], atol=atol, rtol=0)
        closed = sorted(set(range(H)) - set(keep.hidden))
        assert not hidden[..., closed].any()

    check()


@pytest.mark.parametrize("pooler", [True, False])
def test_expected_count_at_binary_gates_is_the_real_count(build_model, tiny_shape, axes, pooler):
    shape = replace(tiny_shape, pooler=pooler, colbert_dim=24)
    model = build_model(shape)

    @fast
    @given(z=gates(axes))
    def check(z: dict[str, Tensor]) -> None:
        backbone, heads = copy.deepcopy(model)
        cut(backbone, heads, backbone.keep_indices(PruningMasks(**z)))
        expected = expected_parameters(shape, {a: v.double() for a, v in z.items()}).as_dict()
        real = {part: real_parameters(backbone, part) for part in ("encoder", "embeddings")}
        real |= {"pooler": real_parameters(backbone, "pooler"), "heads": real_parameters(heads, "")}
        assert {k: float(v) for k, v in expected.items()} == {**real, "total": sum(real.values())}
        counted = replace(backbone.count_parameters(), heads=real["heads"])
        assert counted.as_dict() == {**real, "total": sum(real.values())}

    check()


def test_uniform_shapes_load_in_transformers(
    build_model, tiny_shape, target_shape, tiny_hf_config, batch
):
    backbone, heads = build_model(tiny_shape)
    fields = {axis: (field, getattr(target_shape, field)) for axis, field in SHAPE_FIELDS.items()}
    z = {}
    for axis, value in random_gates(AXES, 1, soft=True).items():
        best = value.topk(fields[axis][1], dim=-1).indices
        z[axis] = torch.zeros_like(value).double().scatter(-1, best, 1.0)
    masks = PruningMasks(**z)
    keep = backbone.keep_indices(masks)
    small = hugging_face(tiny_hf_config, **dict(fields.values()))
    with torch.no_grad():
        masked = backbone(**batch, masks=masks)[..., keep.hidden]
        cut(backbone, heads, keep)
        small.load_state_dict(backbone.state_dict(), strict=True)
        extracted = small(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(extracted[real], masked[real], atol=1e-10, rtol=0)
    assert count_parameters(target_shape).encoder == real_parameters(small, "encoder")


def test_kept_weights_are_unchanged_and_frozen_ones_stay_frozen(build_model, tiny_shape):
    backbone, heads = build_model(tiny_shape, torch.float32)
    heads.requires_grad_(False)
    before = copy.deepcopy(backbone.state_dict())
    keep = backbone.keep_indices(PruningMasks(**random_gates(AXES, 2)))
    cut(backbone, heads, keep)
    found, key = backbone.state_dict(), "encoder.layer.{}.attention.self.value.weight"
    rows = [head * 8 + d for head in keep.head[0] for d in range(8)]
    expected = before[key.format(keep.layer[0])][rows][:, keep.hidden]
    assert torch.equal(found[key.format(0)], expected)
    table = "embeddings.word_embeddings.weight"
    assert torch.equal(found[table], before[table][:, keep.hidden])
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"pooler.dense.weight", "pooler.dense.bias"}
    assert not any(p.requires_grad for p in heads.parameters())


@pytest.mark.parametrize("axis", AXES)
def test_gradient_of_soft_gates(build_model, tiny_shape, batch, axis):
    """Against finite differences: every axis has a true, non-zero derivative."""
    backbone, heads = build_model(tiny_shape)
    gates = {a: v.double() * 0.8 + 0.1 for a, v in random_gates(AXES, 4, soft=True).items()}
    direction = torch.randn(gates[axis].shape, generator=torch.Generator().manual_seed(1)).double()

    def loss(shift: Tensor) -> Tensor:
        masks = PruningMasks(**{**gates, axis: gates[axis] + shift * direction})
        hidden = backbone(**batch, masks=masks)
        return heads.dense_vecs(hidden, batch["attention_mask"])[:, 0].sum()

    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(shift), shift)
    with torch.no_grad():
        step = torch.tensor(1e-6, dtype=torch.float64)
        difference = (loss(step) - loss(-step)) / 2e-6
    assert abs(float(gradient)) > 1e-6
    torch.testing.assert_close(gradient, difference, rtol=1e-5, atol=1e-9)


def test_dropout_only_in_training_and_a_row_of_padding_is_no_nan(build_model, tiny_shape, batch):
    backbone, _ = build_model(tiny_shape, dropout=0.5)
    assert torch.equal(backbone(**batch), backbone(**batch))
    ids = torch.ones(1, 3, dtype=torch.long)
    assert backbone(ids, torch.zeros_like(ids)).isfinite().all()
    backbone.train()
    assert not torch.equal(backbone(**batch), backbone(**batch))


def test_a_removed_layer_is_the_identity(build_model, tiny_shape, batch):
    backbone, _ = build_model(tiny_shape)
    only_first = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    with torch.no_grad():
        masked = backbone(**batch, masks=PruningMasks(layer=only_first))
        del backbone.encoder.layer[1:]
        assert torch.equal(masked, backbone(**batch))
