"""Keep indices against plain loops; a cut module against the whole one on the kept structures."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.structural_pruning import (
    AXES,
    KeepIndices,
    PruningMasks,
    compute_keep_indices,
    prune_embedding,
    prune_layer_norm,
    prune_linear,
)

L, A, F, H = 3, 4, 5, 6
SOURCE = EncoderShape(H, A, L, F, vocab_size=9, head_dim=2)
SHAPES = {"head": (L, A), "hidden": (H,), "intermediate": (L, F), "layer": (L,)}
KEEPS = [[0], [2], [1, 3], [0, 1, 2, 3]]
fast = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def gate_lists(draw: st.DrawFn) -> dict[str, list]:
    """Nested lists of 0 and 1 for some of the axes; at least one layer and dimension is open."""

    def row(size: int, lowest: int) -> list[int]:
        bits = draw(st.integers(lowest, 2**size - 1))
        return [bits >> i & 1 for i in range(size)]

    gates = {}
    for axis in draw(st.sets(st.sampled_from(AXES))):
        *rows, size = SHAPES[axis]
        gates[axis] = [row(size, 0) for _ in range(rows[0])] if rows else row(size, 1)
    return gates


def open_gates(gates: list[int] | None, size: int) -> list[int]:
    return [i for i in range(size) if gates is None or gates[i] == 1]


@fast
@given(gate_lists())
def test_keep_indices_are_the_open_gates(gates):
    masks = PruningMasks(**{axis: torch.tensor(z).float() for axis, z in gates.items()})
    keep = compute_keep_indices(masks, SOURCE)
    layers = open_gates(gates.get("layer"), L)
    assert keep.layer == layers
    assert keep.hidden == open_gates(gates.get("hidden"), H)
    # Of the kept layers only, in the source's numbering.
    every = {"head": [None] * L, "intermediate": [None] * L, **gates}
    assert keep.head == [open_gates(every["head"][i], A) for i in layers]
    assert keep.intermediate == [open_gates(every["intermediate"][i], F) for i in layers]


def test_keep_indices_of_the_whole_model_survive_json():
    keep = compute_keep_indices(PruningMasks(), SOURCE)
    assert keep == KeepIndices([0, 1, 2], [*range(H)], [[*range(A)]] * L, [[*range(F)]] * L)
    assert list(keep.as_dict()) == ["layer", "hidden", "head", "intermediate"]
    assert KeepIndices(**json.loads(json.dumps(keep.as_dict()))) == keep


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [0.5, 1.0 + 1e-6, -1.0, float("nan"), float("inf")])
def test_anything_but_0_and_1_is_refused(axis, value):
    masks = PruningMasks(**{axis: torch.ones(SHAPES[axis])})
    assert masks.is_binary()
    getattr(masks, axis).view(-1)[-1] = value
    message = r"^gates are not all 0 or 1, so cutting would change the outputs\. To fix, extract "
    with pytest.raises(ValueError, match=message + r"from deterministic gates \(L0Module"):
        compute_keep_indices(masks, SOURCE)


@pytest.mark.parametrize("axis", ["layer", "hidden"])
def test_nothing_left_is_refused(axis):
    masks = PruningMasks(**{axis: torch.zeros(SHAPES[axis])})
    message = rf"^no {axis} gate is open: nothing would be left\. To fix, keep at least 1\.$"
    with pytest.raises(ValueError, match=message):
        compute_keep_indices(masks, SOURCE)


@pytest.mark.parametrize(
    ("axis", "shape"),
    [("hidden", (H - 1,)), ("layer", (L - 1,)), ("head", (L + 1, A)), ("intermediate", (L, F - 1))],
)
def test_gates_of_another_model_are_refused(axis, shape):
    # They would silently cut what has no gate, or ignore gates that are there.
    message = rf"{axis}.*{', '.join(map(str, shape))}.*{', '.join(map(str, SHAPES[axis]))}.*To fix"
    with pytest.raises(ValueError, match=message):
        compute_keep_indices(PruningMasks(**{axis: torch.ones(shape)}), SOURCE)


def linear(bias: bool = True) -> nn.Linear:
    """4 inputs and 4 outputs, so that a cut of the wrong side has the right shape."""
    return nn.Linear(4, 4, bias=bias).double()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep", [[], *KEEPS])
def test_cut_outputs_are_the_kept_outputs_and_cut_inputs_are_inputs_at_zero(keep, bias):
    layer, other, x = linear(bias), linear(bias), random(7, 4)
    masked = torch.zeros_like(x)
    masked[:, keep] = x[:, keep]
    outputs, inputs = layer(x)[:, keep], other(masked)
    prune_linear(layer, keep, dim=0)
    prune_linear(other, keep, dim=1)
    torch.testing.assert_close(layer(x), outputs, atol=1e-14, rtol=0)
    torch.testing.assert_close(other(x[:, keep]), inputs, atol=1e-14, rtol=0)
    assert (layer.in_features, layer.out_features) == (4, len(keep))
    assert (other.in_features, other.out_features) == (len(keep), 4)


@pytest.mark.parametrize(
    ("keep", "dim", "message"),
    [
        *(([0], dim, rf"^dim {dim} is neither 0 \(outputs\) nor 1 .* To fix") for dim in (2, -1)),
        *((keep, dim, "out of") for keep in ([4], [-1], [0, 99]) for dim in (0, 1)),
    ],
)
def test_what_cannot_be_cut_cuts_nothing(keep, dim, message):
    layer = linear()
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        prune_linear(layer, keep, dim=dim)
    assert layer.weight.shape == (4, 4) and layer.bias.shape == (4,)


@pytest.mark.parametrize("keep", KEEPS)
def test_cut_embedding_is_the_kept_columns(keep):
    table = nn.Embedding(9, 4, padding_idx=1)
    ids = torch.tensor([[0, 1, 8], [3, 3, 1]])
    expected = table(ids)[..., keep]
    prune_embedding(table, keep)
    assert torch.equal(table(ids), expected)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (9, len(keep), 1)


@pytest.mark.parametrize("keep", KEEPS)
def test_cut_layer_norm_is_layer_norm_over_the_kept_dimensions(keep):
    norm, u = nn.LayerNorm(4, eps=1e-3).double(), random(5, 4)
    with torch.no_grad():
        norm.weight.copy_(random(4))
        norm.bias.copy_(random(4) + 1.0)
    kept = u[:, keep]
    scale = (kept.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()
    expected = (kept - kept.mean(-1, keepdim=True)) / scale * norm.weight[keep] + norm.bias[keep]
    prune_layer_norm(norm, keep)
    torch.testing.assert_close(norm(kept), expected, atol=1e-12, rtol=0)
    assert norm.normalized_shape == (len(keep),)


CUTS = {
    "outputs": (lambda: nn.Linear(4, 4), lambda m, keep: prune_linear(m, keep, dim=0)),
    "inputs": (lambda: nn.Linear(4, 4), lambda m, keep: prune_linear(m, keep, dim=1)),
    "embedding": (lambda: nn.Embedding(9, 4), prune_embedding),
    "layer norm": (lambda: nn.LayerNorm(4), prune_layer_norm),
}


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("cut", CUTS)
def test_cut_parameters_are_contiguous_leaves_as_trainable_as_before(cut, frozen):
    build, prune = CUTS[cut]
    module = build().bfloat16()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name != frozen)
    prune(module, [1, 3])
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name != frozen)
        assert parameter.is_leaf and parameter.is_contiguous()
        assert parameter.dtype == torch.bfloat16


@pytest.mark.parametrize("cut", CUTS)
def test_cut_parameters_are_copies_and_those_kept_whole_are_not(cut):
    """The word table of BGE-M3 is 1 GB."""
    build, prune = CUTS[cut]
    module = build()
    before = dict(module.named_parameters())
    prune(module, [0, 1, 2, 3])
    assert all(module.get_parameter(name) is old for name, old in before.items())
    prune(module, [1, 3])
    for name, parameter in module.named_parameters():
        if cut == "inputs" and name == "bias":
            continue
        assert parameter.data_ptr() != before[name].data_ptr()
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
