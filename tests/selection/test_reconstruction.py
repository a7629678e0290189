"""Refitting a cut encoder, and the importance that looks forward to it."""

import copy

import pytest
import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.embedding_heads import EmbeddingHeads
from bge_pruning.models.packing import compute_packing
from bge_pruning.models.structural_pruning import KeepIndices
from bge_pruning.models.teacher import compute_outputs
from bge_pruning.selection import reconstruction_importance, sensitivity
from bge_pruning.selection.reconstruction import refit_

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def batches() -> Batches:
    """Forty texts of 2 to 20 tokens, and none of padding alone."""
    generator = torch.Generator().manual_seed(6)
    return [draw(8, generator) for _ in range(5)]


def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lengths = torch.randint(2, 21, (rows, 1), generator=generator)
    mask = (torch.arange(20) < lengths).long()
    ids = torch.randint(4, 99, (rows, 20), generator=generator)
    return ids.masked_fill(mask == 0, 1), mask


@pytest.fixture
def teacher(build_model, tiny_shape) -> XLMRobertaBackbone:
    return build_model(tiny_shape, torch.float32, seed=1)[0].eval()


def weighed(teacher, batches: Batches) -> list[sensitivity.WeighedTexts]:
    heads = EmbeddingHeads(32, "mean", sparse=False, colbert_dim=0)
    return sensitivity.weigh_tokens(teacher, heads.eval(), batches)


def cut(teacher: XLMRobertaBackbone, layers: list[int], units=48, hidden=32, heads=4):
    """A copy without some of it, and what it has kept."""
    inner = [[list(range(size))] * len(layers) for size in (heads, units)]
    keep = KeepIndices(layers, list(range(hidden)), *inner)
    student = copy.deepcopy(teacher)
    student.prune(keep)
    return student, keep


def distance(student: XLMRobertaBackbone, teacher: XLMRobertaBackbone, batches: Batches) -> float:
    """Mean squared difference of the last hidden states of real tokens."""
    total = count = 0.0
    with torch.no_grad():
        for ids, mask in batches:
            states = [model(ids, mask) for model in (student, teacher)]
            size = states[0].shape[-1]
            total += float((states[0] - states[1][..., :size]).square().sum())
            count += float(mask.sum()) * size
    return total / count


def test_what_is_whole_stays_as_it_is(teacher, batches):
    teacher = teacher.double()
    student = copy.deepcopy(teacher)
    refit_(student, teacher, range(4), range(32), weighed(teacher, batches))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, teacher.state_dict()[name], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "kept",
    [
        {"layers": [0, 1, 2, 3], "units": 24},
        {"layers": [0, 1, 2, 3], "heads": 2},
        {"layers": [1, 2]},
        {"layers": [3], "units": 24, "heads": 3},
    ],
)
def test_it_comes_nearer_to_the_teacher_on_other_texts(kept, teacher, batches):
    student, keep = cut(teacher, **kept)
    before = distance(student, teacher, batches[4:])
    refit_(student, teacher, keep.layer, keep.hidden, weighed(teacher, batches[:4]))
    assert distance(student, teacher, batches[4:]) < 0.9 * before


def test_only_output_projections_and_the_last_layer_norms_change(teacher, batches):
    student, keep = cut(teacher, [0, 2], units=24)
    before = copy.deepcopy(student.state_dict())
    refit_(student, teacher, keep.layer, keep.hidden, weighed(teacher, batches))
    changed = {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])}
    names = {name.split(".", 3)[3].rsplit(".", 1)[0] for name in changed}
    assert names <= {"attention.output.dense", "output.dense", "output.LayerNorm"}
    norm = student.encoder.layer[1].output.LayerNorm
    assert torch.equal(norm.weight, teacher.encoder.layer[3].output.LayerNorm.weight)
    assert all(p.requires_grad and p.grad is None for p in student.encoder.parameters())
    student, keep = cut(teacher, [0, 1, 3], hidden=24, heads=3)
    before = distance(student, teacher, batches)
    refit_(student, teacher, keep.layer, keep.hidden, weighed(teacher, batches))
    assert distance(student, teacher, batches) < before


def importance_of(teacher, batches, pooling="cls", colbert_dim=0, sparse=False, seed=0):
    torch.manual_seed(3)
    heads = EmbeddingHeads(32, pooling, sparse=sparse, colbert_dim=colbert_dim).eval()
    return reconstruction_importance.reconstruction_importance(teacher, heads, batches, seed)


@pytest.mark.parametrize("colbert_dim", [0, 16])
@pytest.mark.parametrize("sparse", [False, True])
def test_heads_and_units_of_each_layer_are_ranked(
    teacher, batches, tiny_shape, colbert_dim, sparse
):
    importance = importance_of(teacher, batches, colbert_dim=colbert_dim, sparse=sparse)
    assert {axis: tuple(s.shape) for axis, s in vars(importance).items()} == tiny_shape.gate_shapes
    for scores in (importance.head, importance.intermediate):
        assert torch.equal(scores.sort(dim=1).values[0], torch.arange(scores.shape[1]).double())


def test_a_copied_unit_is_not_needed_twice(teacher, batches):
    before = importance_of(teacher, batches).intermediate[1]
    most, least = int(before.argmax()), int(before.argmin())
    half = teacher.encoder.layer[1].intermediate.dense
    with torch.no_grad():
        half.weight[least] = half.weight[most]
        half.bias[least] = half.bias[most]
    places = importance_of(teacher, batches).intermediate[1]
    assert min(places[most], places[least]) < len(places) / 4


def test_a_unit_that_no_output_feels_goes_first(teacher, batches):
    """A constant of all dimensions is what the LayerNorm behind takes away, however large."""
    with torch.no_grad():
        for layer in teacher.encoder.layer:
            layer.output.dense.weight[:, 5] = 100.0
    places = importance_of(teacher, batches, "mean", colbert_dim=16).intermediate
    assert (places[:, 5] < places.shape[1] / 8).all()


def test_gradients_are_those_of_the_sublayer(teacher, batches):
    """Their sum over tokens is the gradient of the projection's bias, and padding has none."""
    heads = EmbeddingHeads(32, "mean", sparse=True, colbert_dim=16).eval()
    ids, mask = batches[0]
    names, generator = heads.names(), torch.Generator().manual_seed(0)
    output = teacher.encoder.layer[2].output
    found = compute_outputs(teacher, heads, ids, mask, names)
    sum(sensitivity._project(name, found[name], mask, generator) for name in names).backward()
    summed = output.dense.bias.grad.double()
    heard = reconstruction_importance._Sublayer(output)
    told: list[tuple[Tensor, ...]] = []
    hear = {output: lambda *given: [told.append(given), heard.add(*given)]}
    sensitivity.probe(teacher, heads, [(ids, mask)], hear, seed=0)
    ((inputs, gradient, _),) = told
    assert len(inputs) == len(gradient) == int(mask.sum())
    torch.testing.assert_close(gradient.sum(0), summed, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(heard.gg, gradient.T @ gradient)
    assert heard.xx[-1, -1] == pytest.approx(float(gradient.square().sum()), rel=1e-6)


def test_tokens_weigh_what_is_felt_of_them_and_texts_alike():
    """``(1 - a) / T + a |g|^2 / sum |g|^2``, a = 1/2, at most ten times the mean."""
    lengths = torch.tensor([40, 4, 2, 2])
    packing = compute_packing(torch.arange(40) < lengths[:, None])
    felt = torch.ones(4, 40).double()
    felt[0, 0], felt[1, 0], felt[3, :] = 1e6, 5.0, 0.0
    weights = sensitivity.token_weights(packing.pack(felt).sqrt()[:, None], packing)
    found = packing.unpack(weights[:, None])[..., 0]
    assert found[0, 0] == 10 / 40  # without the bound 0.51
    assert found[0, 1:].tolist() == pytest.approx([0.5 / 40] * 39, rel=1e-3)
    expected = [0.5 / 4 + 0.5 * 5 / 8, *[0.5 / 4 + 0.5 / 8] * 3, 0]
    assert found[1, :5].tolist() == pytest.approx(expected)
    assert found[2, :2].tolist() == [0.5, 0.5]
    assert found[3, :2].tolist() == [0.25, 0.25]  # no output feels it


@pytest.mark.parametrize(("pooling", "most"), [("cls", 0.92), ("mean", 1.01)])
def test_a_dense_vector_of_one_token_is_fitted_too(pooling, most, teacher, monkeypatch):
    """With equal weights, the first token has 1 / T of the fit, and may be all that counts."""
    heads = EmbeddingHeads(32, pooling, sparse=False, colbert_dim=0).eval()
    generator = torch.Generator().manual_seed(6)
    *fitted, test = (draw(64, generator) for _ in range(4))
    for ids, _ in (*fitted, test):
        ids[:, 0] = 0  # <s>

    def error(share: float) -> float:
        monkeypatch.setattr(sensitivity, "FELT_SHARE", share)
        student, keep = cut(teacher, [1, 2])
        texts = sensitivity.weigh_tokens(teacher, heads, fitted)
        refit_(student, teacher, keep.layer, keep.hidden, texts)
        vectors = [
            compute_outputs(model, heads, *test, ["dense_vecs"])["dense_vecs"]
            for model in (student, teacher)
        ]
        return float((vectors[0] - vectors[1]).square().sum().detach())

    assert error(0.5) < most * error(0.0)


def test_token_weights_count_whatever_their_size_and_padding_does_not():
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) + 0.1
    mask = torch.ones(3, 8)
    mask[0, 5:] = 0

    def project(values: Tensor) -> float:
        generator = torch.Generator().manual_seed(2)
        return float(sensitivity._project("token_weights", values, mask, generator))

    assert project(10.0 * weights) == pytest.approx(project(weights), rel=1e-5)
    assert project(weights + 5.0 * (1.0 - mask)) == pytest.approx(project(weights), rel=1e-5)
    assert abs(project(1e-6 * weights)) < 1e-3  # next to nothing is not made large


def test_what_the_sparse_head_feels_counts(teacher, batches):
    """The dense vector is the first token's, to which the others of the last layer are nothing."""
    felt = {}
    for sparse in (False, True):
        heads = EmbeddingHeads(32, "cls", sparse=sparse, colbert_dim=0).eval()
        heard = reconstruction_importance._Sublayer(teacher.encoder.layer[-1].output)
        ids, mask = batches[0]
        sensitivity.probe(teacher, heads, [(ids, mask)], {heard.output: heard.add}, seed=0)
        felt[sparse] = int(torch.linalg.matrix_rank(heard.xx))
    # Inputs count of the tokens that are felt: one of each text, or all.
    assert felt[False] <= len(ids) < felt[True]


def test_texts_count_alike_however_they_are_padded_and_split(teacher, batches, monkeypatch):
    whole = importance_of(teacher.double(), batches[:1])
    ids, mask = batches[0]
    wider = [torch.nn.functional.pad(ids, (0, 6), value=1), torch.nn.functional.pad(mask, (0, 6))]
    monkeypatch.setattr("bge_pruning.selection.sensitivity.PIECE_TOKENS", 60)
    split = importance_of(teacher, [tuple(wider)])
    assert torch.equal(whole.intermediate, split.intermediate)
    assert torch.equal(whole.head, split.head)


def test_importance_leaves_the_model_as_it_was_and_needs_a_text(teacher, batches):
    teacher.embeddings.word_embeddings.requires_grad_(False)
    flags = [p.requires_grad for p in teacher.parameters()]
    importance_of(teacher, batches, colbert_dim=16)
    with pytest.raises(ValueError, match="there is no text"):
        importance_of(teacher, [])
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters())
    modules = list(teacher.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)
