"""Refitting a cut encoder, and the importance that looks forward to it."""

import copy

import pytest
import torch
from torch import Tensor

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.reconstruction import refit_
from bge_pruning.models.reconstruction_importance import reconstruction_importance
from bge_pruning.models.structural_pruning import KeepIndices

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture
def batches() -> Batches:
    """Forty texts of 2 to 20 tokens, and none of padding alone."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for _ in range(5):
        lengths = torch.randint(2, 21, (8, 1), generator=generator)
        mask = (torch.arange(20) < lengths).long()
        ids = torch.randint(4, 99, (8, 20), generator=generator)
        found.append((ids.masked_fill(mask == 0, 1), mask))
    return found


@pytest.fixture
def teacher(build_model, tiny_shape) -> XLMRobertaBackbone:
    return build_model(tiny_shape, torch.float32, seed=1)[0].eval()


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
    refit_(student, teacher, range(4), range(32), batches)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, teacher.state_dict()[name], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "kept",
    [
        {"layers": [0, 1, 2, 3], "units": 24},
        {"layers": [0, 1, 2, 3], "heads": 2},
        {"layers": [0, 2]},
        {"layers": [1, 2]},
        {"layers": [3], "units": 24, "heads": 3},
    ],
)
def test_it_comes_nearer_to_the_teacher_on_other_texts(kept, teacher, batches):
    student, keep = cut(teacher, **kept)
    before = distance(student, teacher, batches[4:])
    refit_(student, teacher, keep.layer, keep.hidden, batches[:4])
    assert distance(student, teacher, batches[4:]) < 0.9 * before


def test_with_fewer_dimensions_too(teacher, batches):
    student, keep = cut(teacher, [0, 1, 3], hidden=24, heads=3)
    before = distance(student, teacher, batches)
    refit_(student, teacher, keep.layer, keep.hidden, batches)
    assert distance(student, teacher, batches) < before


def test_only_output_projections_and_the_last_layer_norms_change(teacher, batches):
    student, keep = cut(teacher, [0, 2], units=24)
    before = copy.deepcopy(student.state_dict())
    refit_(student, teacher, keep.layer, keep.hidden, batches)
    changed = {n for n, v in student.state_dict().items() if not torch.equal(v, before[n])}
    assert {name.split(".", 3)[3].rsplit(".", 1)[0] for name in changed} <= {
        "attention.output.dense",
        "output.dense",
        "output.LayerNorm",
    }
    norm = student.encoder.layer[1].output.LayerNorm
    assert torch.equal(norm.weight, teacher.encoder.layer[3].output.LayerNorm.weight)


def test_no_gradient_is_kept(teacher, batches):
    student, keep = cut(teacher, [0, 2], units=24)
    refit_(student, teacher, keep.layer, keep.hidden, batches)
    assert all(p.requires_grad and p.grad is None for p in student.encoder.parameters())


def test_importance_ranks_heads_and_units_of_each_layer(teacher, batches, tiny_shape):
    importance = reconstruction_importance(teacher, batches)
    shape = tiny_shape
    for scores, size in (
        (importance.head, shape.num_attention_heads),
        (importance.intermediate, shape.intermediate_size),
    ):
        assert scores.shape == (shape.num_hidden_layers, size)
        assert torch.equal(scores.sort(dim=1).values[0], torch.arange(size).double())
    assert importance.hidden.shape == (shape.hidden_size,)
    assert importance.layer.shape == (shape.num_hidden_layers,)


def test_a_copied_unit_is_not_needed_twice(teacher, batches):
    before = reconstruction_importance(teacher, batches).intermediate[1]
    most, least = int(before.argmax()), int(before.argmin())
    half = teacher.encoder.layer[1].intermediate.dense
    with torch.no_grad():
        half.weight[least] = half.weight[most]
        half.bias[least] = half.bias[most]
    places = reconstruction_importance(teacher, batches).intermediate[1]
    assert min(places[most], places[least]) < len(places) / 4
