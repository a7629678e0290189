import numpy as np
import pytest

from bge_pruning.reports.tables import render_by_layer, render_constraint, render_pruned


def text(parts):
    return "\n\n".join(parts)


# What was pruned


def test_shapes_layers_and_gates(inputs):
    said = text(render_pruned(inputs))
    assert "| num_hidden_layers | 4 | 2 |" in said
    assert "Layers that stay, counted from 0: 0, 3. Removed: 1, 2." in said
    assert "| layers | 4 | 2.0 | 2 | 50.0% |" in said
    heads = inputs.gates["head"].sum()
    kept = inputs.kept["head"][[0, 3]].sum()  # those of removed layers are gone with them
    assert f"| attention heads | 8 | {heads:.1f} | {kept} |" in said


def test_layers_are_listed_only_where_some_are_gone(inputs):
    inputs.pruning["kept"]["layer"] = [0, 1, 2, 3]
    assert "Layers that stay" not in text(render_pruned(inputs))
    inputs.pruning["kept"]["layer"] = None
    assert "Layers that stay" not in text(render_pruned(inputs))


def test_gates_that_nothing_was_cut_by(inputs):
    inputs.pruning, inputs.kept = None, {}
    assert "| layers | 4 | 2.0 | - | 50.0% |" in text(render_pruned(inputs))
    assert "shape" not in text(render_pruned(inputs))


def test_layer_by_layer(inputs):
    heading, table = render_by_layer(inputs)
    assert heading == "### Layer by layer"
    lines = table.splitlines()
    assert len(lines) == 2 + 4
    assert len({line.count("|") for line in lines}) == 1
    units = inputs.gates["intermediate"].sum(axis=1)
    heads = inputs.gates["head"].sum(axis=1)
    assert lines[2] == f"| 0 | yes | 0.900 | {heads[0]:.1f} | 1 | {units[0]:.1f} | 16 |"
    assert lines[3] == f"| 1 | no | 0.100 | {heads[1]:.1f} | - | {units[1]:.1f} | - |"


@pytest.mark.parametrize(
    ("axes", "columns"), [({"layer"}, 3), ({"head"}, 3), ({"head", "intermediate"}, 5)]
)
def test_layer_by_layer_of_some_axes(axes, columns, inputs):
    for arrays in (inputs.gates, inputs.kept):
        for axis in set(arrays) - axes:
            del arrays[axis]
    _, table = render_by_layer(inputs)
    assert {line.count("|") for line in table.splitlines()} == {columns + 1}


def test_hidden_dimensions_have_no_layers(inputs):
    inputs.gates = {"hidden": np.array([0.2, 0.8])}
    assert render_by_layer(inputs) == []
    inputs.gates = {}
    assert render_by_layer(inputs) == []


# How the constraint was met


def test_the_distance_is_said_when_it_is_small(inputs):
    said = text(render_constraint(inputs))
    assert "| layers | 49.90% | 50.00% | 50.00% | 0.10 points |" in said
    assert "after the cut" in said
    assert "largest distance between gates and target is 0.10 points of sparsity (layers)." in said


@pytest.mark.parametrize(
    ("expected", "loud"), [(0.4901, False), (0.48, True), (0.52, True), (float("nan"), True)]
)
def test_gates_far_from_the_target_are_said_loudly(expected, loud, inputs, make_pruning):
    inputs.pruning = make_pruning(expected)
    assert (
        "WARNING: the gates never reached the target" in text(render_constraint(inputs))
    ) == loud


def test_the_worst_axis_is_the_one_that_counts(inputs):
    row = {"target_sparsity": 0.25, "realised_sparsity": 0.25}
    inputs.pruning["constraint"]["hidden"] = {**row, "expected_sparsity": 0.2}
    inputs.pruning["constraint"]["bud*get"] = {**row, "expected_sparsity": 0.27}
    said = text(render_constraint(inputs))
    assert "they were 5.00 points of sparsity (hidden dimensions) away" in said
    assert r"| bud\*get | 27.00% | 25.00% | 25.00% | 2.00 points |" in said


def test_before_a_cut_the_history_says_it(inputs):
    inputs.pruning = None
    said = text(render_constraint(inputs))
    assert "what a cut would remove" in said and "after the cut" not in said
    assert "| attention heads | 49.00% | 50.00% | 50.00% | 1.00 points |" in said
    inputs.series["pruning/expected_sparsity/head"][1][-1] = 0.3
    assert "The cut would give the exact target" in text(render_constraint(inputs))


def test_a_run_without_gates(inputs):
    inputs.pruning["constraint"] = {}
    assert render_constraint(inputs) == ["No axis was pruned by gates."]
    inputs.pruning, inputs.series = None, {}
    assert render_constraint(inputs) == []
