import numpy as np
import pytest

from bge_pruning.utils.visualization import DARK, draw_gates

SHAPES = {"head": (4, 3), "intermediate": (4, 24), "layer": (4,), "hidden": (16,)}


@pytest.fixture
def gates():
    rng = np.random.default_rng(0)
    return {axis: rng.uniform(size=shape) for axis, shape in SHAPES.items()}


@pytest.fixture
def kept(gates):
    return {
        axis: values >= np.median(values, axis=-1, keepdims=True) for axis, values in gates.items()
    }


@pytest.mark.parametrize(
    "axes", [list(SHAPES), ["head", "intermediate"], ["layer"], ["hidden"], ["head", "hidden"]]
)
def test_any_subset_of_axes(axes, gates, kept, assert_legible):
    figure = draw_gates({axis: gates[axis] for axis in axes}, {axis: kept[axis] for axis in axes})
    assert len(figure.axes) == len(axes) + 1  # and the scale
    assert_legible(figure)


def test_what_was_kept_is_said(gates, kept, said):
    kept["layer"] = np.array([True, False, True, True])
    kept["head"][1] = True  # the gates of a removed layer are not counted
    text = said(draw_gates(gates, kept, DARK))
    assert "Layers kept:\n3 of 4" in text
    assert "Attention heads kept: 2 of 3 per layer" in text
    assert "Intermediate units kept: 12 of 24 per layer" in text
    assert "Hidden dimensions kept: 8 of 16" in text
    assert text.count("layer removed") == 2


def test_uneven_layers_are_added_up(gates, said):
    kept = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=bool)
    text = said(draw_gates({"head": gates["head"]}, {"head": kept}))
    assert "Attention heads kept: 6 of 12" in text


def test_gates_without_a_cut(gates, said):
    assert "kept" not in said(draw_gates(gates, {}))


def test_every_head_that_was_removed_has_a_cross(gates, kept):
    kept["layer"] = np.array([True, True, True, False])
    figure = draw_gates(gates, kept)
    crosses = figure.axes[1].collections[0].get_offsets()
    expected = [(head, row) for row in range(3) for head in range(3) if not kept["head"][row, head]]
    assert sorted(map(tuple, crosses.tolist())) == sorted(expected)


def test_units_are_sorted_in_each_row_and_cut_where_the_kept_ones_end(gates, kept):
    figure = draw_gates(
        {"intermediate": gates["intermediate"]}, {"intermediate": kept["intermediate"]}
    )
    panel = figure.axes[0]
    expected = -np.sort(-gates["intermediate"], axis=1)
    np.testing.assert_array_equal(panel.images[0].get_array(), expected)
    assert {segment[0, 0] for segment in panel.collections[-1].get_segments()} == {11.5}


def test_bge_m3_fits(assert_legible):
    rng = np.random.default_rng(0)
    shapes = {"head": (24, 16), "intermediate": (24, 4096), "layer": (24,), "hidden": (1024,)}
    gates = {axis: rng.uniform(size=shape) for axis, shape in shapes.items()}
    assert_legible(draw_gates(gates, {axis: values > 0.5 for axis, values in gates.items()}))


def test_gates_that_make_no_sense(gates):
    with pytest.raises(ValueError, match=r"no gates to draw among \['width'\]\. To fix"):
        draw_gates({"width": np.ones(3)}, {})
    with pytest.raises(ValueError, match=r"gates of head have shape \(3,\), not 2 dim.*To fix"):
        draw_gates({"head": np.ones(3)}, {})
    with pytest.raises(ValueError, match=r"kept of layer has shape \(3,\), its gates \(4,\)\. To"):
        draw_gates({"layer": gates["layer"]}, {"layer": np.ones(3, bool)})
    for bad in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"gates of layer are not in .* not log_alpha"):
            draw_gates({"layer": np.array([0.5, bad])}, {})
