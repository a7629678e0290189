"""Shapes that a budget allows, and which of them the gates prefer."""

import pytest
import torch

from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.models.hard_concrete import open_probability
from bge_pruning.models.shape_choice import MaskLikelihood, best_shape, shapes_of_budget
from bge_pruning.models.structural_pruning import AXES

MIDDLE = EncoderShape(256, 4, 6, 1024, 500, head_dim=64, colbert_dim=256)


def test_where_texts_are_long_the_same_parameters_are_slower():
    """A speed-up at long texts leaves a shape of fewer parameters than at short ones."""
    axes = ("head", "hidden", "intermediate")
    short, long = (
        max(count_parameters(s).encoder for s in shapes_of_budget(MIDDLE, axes, None, 2.0, length))
        for length in (16, 8192)
    )
    assert long < 0.95 * short


def test_likelihood_of_a_layers_mask_is_its_formula():
    gates = torch.tensor([2.0, -1.0, 0.5, -3.0, 4.0, 0.0])
    likelihood = MaskLikelihood(MIDDLE, {"layer": gates})
    p = open_probability(gates.double())
    kept = torch.tensor([1, 0, 1, 0, 1, 0], dtype=torch.float64)
    expected = (kept * p.log() + (1 - kept) * (1 - p).log()).sum()
    one = count_parameters(MIDDLE).encoder / 6
    shape = EncoderShape(256, 4, 3, 1024, 500, head_dim=64, colbert_dim=256)
    assert likelihood(shape) == pytest.approx(one * float(expected), rel=1e-9)


def test_the_best_shape_is_found_with_few_questions():
    shapes = shapes_of_budget(MIDDLE, AXES, count_parameters(MIDDLE).encoder / 2, None, 128)
    asked = []

    def error(shape):
        asked.append(shape)
        return abs(shape.num_hidden_layers - best.num_hidden_layers) + abs(
            shape.num_attention_heads - best.num_attention_heads
        )

    for best in shapes:
        if best.num_attention_heads < 3:
            continue  # two heads away from the full width the depth may be out of reach
        asked.clear()
        assert best_shape(shapes, error) == best
        assert len(set(asked)) == len(asked)
        assert {s for s in shapes if s.num_attention_heads == 4} <= set(asked)
    shapes = shapes_of_budget(MIDDLE, AXES, 0.3 * count_parameters(MIDDLE).encoder, None, 128)
    depth = next(s.num_hidden_layers for s in shapes if s.num_attention_heads == 3)
    asked = []

    def error(shape):
        asked.append(shape.num_attention_heads)
        return (shape.num_attention_heads == 3) + 0.1 * abs(shape.num_hidden_layers - depth)

    assert {s.num_attention_heads for s in shapes} > {4, 3}
    assert best_shape(shapes, error).num_attention_heads == 4
    assert set(asked) == {4, 3}
