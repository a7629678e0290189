"""Themes, look and saving of pictures, read back from the file, and the map of the gates."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from bge_pruning.utils import visualization as figures
from bge_pruning.utils.visualization import DARK, LIGHT, THEMES

# As published: Okabe and Ito, "Color Universal Design" (2008).
OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
SHAPES = {"head": (4, 3), "intermediate": (4, 24), "layer": (4,), "hidden": (16,)}


def draw(theme, width=2, height=1, title="Words"):
    with theme.context():
        figure = figures.make_figure(width, height)
        figure.subplots().set_title(title)
    return figure


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_colours_can_be_told_apart_by_colour_blind_readers_and_stand_out_from_the_page(theme):
    assert set(theme.series) <= OKABE_ITO
    assert len(set(theme.series)) == 5
    assert all(figures.contrast(colour, theme.surface) >= 3 for colour in theme.series)
    assert figures.contrast(theme.ink, theme.surface) >= 7
    assert figures.contrast(theme.muted, theme.surface) >= 4.5
    assert all(figures.contrast(figures.text_on(fill), fill) >= 4.5 for fill in theme.fills)


def test_contrast_is_that_of_wcag_and_named_colours_are_those_that_were_published():
    assert figures.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert figures.contrast("#FFFFFF", "#777777") == pytest.approx(4.48, abs=0.01)
    assert figures.contrast("#123456", "#123456") == 1
    values = [value for name, value in vars(figures).items() if name.isupper()]
    named = {value for value in values if isinstance(value, str) and value.startswith("#")}
    assert named == OKABE_ITO - {"#000000"}


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_ticks_made_while_saving_have_the_theme(theme):
    before = dict(matplotlib.rcParams)
    svg = figures.render_svg(draw(theme), theme).upper()
    assert dict(matplotlib.rcParams) == before  # other figures are left alone
    other = DARK if theme is LIGHT else LIGHT
    assert theme.ink in svg and theme.surface in svg
    assert other.ink not in svg
    assert "FILL: #000000" not in svg


@pytest.mark.parametrize(
    ("theme", "corner"), [(LIGHT, (255, 255, 255)), (DARK, (0x15, 0x19, 0x1E))]
)
def test_an_image_has_the_colour_of_the_page_and_180_dots_in_an_inch(theme, corner, tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    figures.save_figure(draw(theme, 7.5, 2.5), str(path), theme)
    with Image.open(path) as image:
        assert image.size == (1350, 450)
        assert image.info["dpi"] == pytest.approx((180, 180), abs=0.1)
        assert image.convert("RGB").getpixel((0, 0)) == corner
    pixels = figures.render_pixels(draw(theme), theme, dpi=50)
    assert pixels.shape == (50, 100, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[0, 0]) == corner


def test_an_earlier_picture_is_replaced_or_stays_if_saving_fails(tmp_path, monkeypatch):
    for width in (1, 2):
        figures.save_figure(figures.make_figure(width, 1), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 360
    before = (tmp_path / "a.png").read_bytes()
    figure = figures.make_figure(2, 1)

    def fill_the_disk(path, **_):
        path.write_bytes(b"\x89PNG half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        figures.save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_svg_is_the_same_twice_and_needs_no_font():
    assert "<svg" in figures.render_svg(draw(LIGHT, title=r"$\broken$"))  # dollars are no formula
    first, second = (figures.render_svg(draw(LIGHT)) for _ in range(2))
    assert first == second
    assert "<text" not in first and "http" not in first.split("<defs>", 1)[1]


def test_pyplot_is_never_imported(tmp_path):
    code = (
        "import sys; import bge_pruning.utils.visualization as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"f.save_figure(f.make_figure(1, 1), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    figure = figures.draw_gates(
        {axis: gates[axis] for axis in axes}, {axis: kept[axis] for axis in axes}
    )
    assert len(figure.axes) == len(axes) + 1  # and the scale
    assert_legible(figure)


def test_what_was_kept_is_said(gates, kept, said):
    kept["layer"] = np.array([True, False, True, True])
    kept["head"][1] = True  # the gates of a removed layer are not counted
    text = said(figures.draw_gates(gates, kept, DARK))
    assert "Layers kept:\n3 of 4" in text
    assert "Attention heads kept: 2 of 3 per layer" in text
    assert "Intermediate units kept: 12 of 24 per layer" in text
    assert "Hidden dimensions kept: 8 of 16" in text
    assert text.count("layer removed") == 2
    # Uneven layers are added up, and gates without a cut keep nothing.
    kept = np.array([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=bool)
    text = said(figures.draw_gates({"head": gates["head"]}, {"head": kept}))
    assert "Attention heads kept: 6 of 12" in text
    assert "kept" not in said(figures.draw_gates(gates, {}))


def test_removed_heads_have_a_cross_and_sorted_units_a_cut_where_the_kept_ones_end(gates, kept):
    kept["layer"] = np.array([True, True, True, False])
    figure = figures.draw_gates(gates, kept)
    crosses = figure.axes[1].collections[0].get_offsets()
    expected = [(head, row) for row in range(3) for head in range(3) if not kept["head"][row, head]]
    assert sorted(map(tuple, crosses.tolist())) == sorted(expected)
    axis = "intermediate"
    panel = figures.draw_gates({axis: gates[axis]}, {axis: kept[axis]}).axes[0]
    np.testing.assert_array_equal(panel.images[0].get_array(), -np.sort(-gates[axis], axis=1))
    assert {segment[0, 0] for segment in panel.collections[-1].get_segments()} == {11.5}


def test_gates_that_make_no_sense(gates):
    ones = np.ones(3)
    for wrong, kept, message in (
        ({"width": ones}, {}, r"no gates to draw among \['width'\]\. To fix"),
        ({"head": ones}, {}, r"gates of head have shape \(3,\), not 2 dim.*To fix"),
        (gates, {"layer": ones}, r"kept of layer has shape \(3,\), its gates \(4,\)\. To"),
        *(
            ({"layer": np.array([0.5, bad])}, {}, "gates of layer are not in .* not log_alpha")
            for bad in (1.5, -0.1, np.nan)
        ),
    ):
        with pytest.raises(ValueError, match=message):
            figures.draw_gates(wrong, kept)
