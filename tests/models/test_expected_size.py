"""Expected parameters and operations: those of the true sizes where gates are binary."""

from dataclasses import replace

import pytest
import torch

from bge_pruning.models.encoder_shape import (
    count_parameters,
    expected_operations,
    expected_parameters,
    forward_flops,
)
from bge_pruning.models.structural_pruning import SHAPE_FIELDS

GATES = {"head": (4, 4), "hidden": (32,), "intermediate": (4, 64), "layer": (4,)}


def test_bge_m3_counts(bge_m3_shape):
    counts = {k: float(v) for k, v in expected_parameters(bge_m3_shape, {}).as_dict().items()}
    assert counts["encoder"] == 302_309_376
    assert counts["embeddings"] == 264_395_776
    assert counts["total"] - counts["heads"] == 567_754_752


@pytest.mark.parametrize("length", [1, 50, 3000])
def test_at_binary_gates_they_are_those_of_the_shape(tiny_shape, gated_axes, length):
    open_half = {}
    for axis in gated_axes:
        open_half[axis] = torch.ones(GATES[axis])
        open_half[axis][..., : GATES[axis][-1] // 2] = 0.0
    fields = [SHAPE_FIELDS[axis] for axis in gated_axes]
    shape = replace(tiny_shape, **{field: getattr(tiny_shape, field) // 2 for field in fields})
    operations = expected_operations(tiny_shape, open_half, length)
    assert float(operations) == pytest.approx(forward_flops(shape, [length]), rel=1e-6)
    found = expected_parameters(tiny_shape, open_half).as_dict()
    for part, count in count_parameters(shape).as_dict().items():
        assert float(found[part]) == pytest.approx(count, rel=1e-6), part
