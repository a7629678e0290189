"""Several sizes from one run's gates."""

import copy
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch

from bge_pruning.models.bge_m3_backbone import XLMRobertaBackbone
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.shape_choice import MaskLikelihood, shapes_near_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS, KeepIndices
from bge_pruning.selection.nested_shapes import choose_nested_shapes, relative_indices

SOURCE = EncoderShape(128, 8, 6, 512, 99, 16, 40)


@pytest.fixture(scope="module")
def gates() -> L0Module:
    full = count_parameters(SOURCE).encoder
    return L0Module(SOURCE, AXES, None, 0.5 * full, init_mean=0.0, init_std=2.0, seed=3)


def encoder_share(shape: EncoderShape) -> float:
    return count_parameters(shape).encoder / count_parameters(SOURCE).encoder


def test_shapes_meet_their_densities_are_nested_and_agree_best(gates):
    shapes = choose_nested_shapes(gates, [0.5, 0.75, 0.6])
    assert [encoder_share(s) for s in shapes] == pytest.approx([0.75, 0.6, 0.5], abs=0.01)
    for large, small in pairwise(shapes):
        assert all(getattr(large, f) >= getattr(small, f) for f in SHAPE_FIELDS.values())
    full = count_parameters(SOURCE).encoder
    agreement = MaskLikelihood(SOURCE, gates.log_alpha)
    fields = SHAPE_FIELDS.values()
    for multiple_of in (64, 32, 16):
        near = [
            shapes_near_budget(SOURCE, frozenset(AXES), d * full, multiple_of)
            for d in (0.75, 0.6, 0.5)
        ]
        nested = [
            chain
            for chain in product(*near)
            if all(getattr(a, f) >= getattr(b, f) for a, b in pairwise(chain) for f in fields)
        ]
        if nested:
            break
    assert len(nested) > 1
    best = max(nested, key=lambda chain: sum(map(agreement, chain)))
    assert choose_nested_shapes(gates, [0.6, 0.75, 0.5]) == list(best)


def test_a_trained_target_shape_is_taken_and_another_cannot_be_reached():
    target = replace(SOURCE, num_hidden_layers=3)
    module = L0Module(SOURCE, ("layer",), target)
    assert choose_nested_shapes(module, [0.5]) == [target]
    message = r"no exportable shapes with 60\.0%, 50\.0% of the encoder are inside each other\. To"
    with pytest.raises(ValueError, match=message + " fix"):
        choose_nested_shapes(module, [0.6, 0.5])


def test_masks_of_smaller_shapes_are_inside_and_cutting_twice_is_cutting_once(gates):
    shapes = choose_nested_shapes(gates, [0.75, 0.5])
    large, small = (gates.masks_of(shape) for shape in shapes)
    for axis in AXES:
        assert (getattr(small, axis) <= getattr(large, axis)).all()
    once = XLMRobertaBackbone(SOURCE)
    twice = copy.deepcopy(once)
    large, small = once.keep_indices(large), once.keep_indices(small)
    once.prune(small)
    twice.prune(large)
    twice.prune(relative_indices(small, large))
    found = twice.state_dict()
    assert all(torch.equal(found.pop(name), value) for name, value in once.state_dict().items())
    assert not found
    large = KeepIndices([0, 2], [1, 5], [[0], [1]], [[3], [4]])
    small = KeepIndices([2], [5], [[1]], [[4]])
    assert relative_indices(small, large) == KeepIndices([1], [1], [[0]], [[0]])
    with pytest.raises(ValueError, match=r"hidden dimensions \[7\] are not in the larger model"):
        relative_indices(replace(small, hidden=[7]), large)
    with pytest.raises(ValueError, match=r"head of layer 2 \[3\] are not in the larger model"):
        relative_indices(replace(small, head=[[3]]), large)


@pytest.mark.parametrize("densities", [[], [0.5, 0.5], [0.0], [1.0], [float("nan")]])
def test_densities_that_make_no_sense(densities, gates):
    with pytest.raises(ValueError, match=r"not different numbers in \(0, 1\)\. To fix, write"):
        choose_nested_shapes(gates, densities)
