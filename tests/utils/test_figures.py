"""Themes, size, look and saving of pictures, read back from the file."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bge_pruning.utils import visualization as figures
from bge_pruning.utils.visualization import (
    DARK,
    LIGHT,
    THEMES,
    contrast,
    dress,
    legend_label,
    make_figure,
    render_pixels,
    render_svg,
    save_figure,
    text_on,
)

# As published: Okabe and Ito, "Color Universal Design" (2008).
OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def draw(theme, width=2, height=1):
    with theme.context():
        figure = make_figure(width, height)
        figure.subplots().set_title("Words")
    return figure


# Themes


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_colours_of_data_can_be_told_apart_by_colour_blind_readers(theme):
    assert set(theme.series) <= OKABE_ITO
    assert len(set(theme.series)) == 5


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_everything_stands_out_from_the_page(theme):
    assert all(contrast(colour, theme.surface) >= 3 for colour in theme.series)
    assert contrast(theme.ink, theme.surface) >= 7
    assert contrast(theme.muted, theme.surface) >= 4.5
    assert all(contrast(text_on(fill), fill) >= 4.5 for fill in theme.fills)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#FFFFFF", "#777777") == pytest.approx(4.48, abs=0.01)
    assert contrast("#123456", "#123456") == 1


def test_a_theme_leaves_other_figures_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(DARK)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_ticks_made_while_saving_have_the_theme(theme):
    svg = render_svg(draw(theme), theme).upper()
    other = DARK if theme is LIGHT else LIGHT
    assert theme.ink in svg and theme.surface in svg
    assert other.ink not in svg
    assert "FILL: #000000" not in svg


def test_dollars_are_no_formula():
    with LIGHT.context():
        figure = make_figure(2, 1)
        figure.subplots().set_title(r"$\broken$")
    assert "<svg" in render_svg(figure)


# Saving


@pytest.mark.parametrize(("width", "height"), [(4.0, 3.0), (7.5, 2.5)])
def test_image_has_the_size_in_inches_times_180(width, height, tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    save_figure(draw(LIGHT, width, height), path)
    with Image.open(path) as image:
        assert image.size == (round(width * 180), round(height * 180))
        assert image.info["dpi"] == pytest.approx((180, 180), abs=0.1)


@pytest.mark.parametrize(
    ("theme", "corner"), [(LIGHT, (255, 255, 255)), (DARK, (0x15, 0x19, 0x1E))]
)
def test_background_is_the_page(theme, corner, tmp_path):
    save_figure(draw(theme), str(tmp_path / "a.png"), theme)
    with Image.open(tmp_path / "a.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == corner
    pixels = render_pixels(draw(theme), theme, dpi=50)
    assert pixels.shape == (50, 100, 3) and pixels.dtype == np.uint8
    assert tuple(pixels[0, 0]) == corner


def test_an_earlier_picture_is_replaced_and_nothing_else_is_left(tmp_path):
    for width in (1, 2):
        save_figure(make_figure(width, 1), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 360
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failing_save_leaves_the_earlier_picture(tmp_path, monkeypatch):
    save_figure(make_figure(1, 1), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    figure = make_figure(2, 1)

    def fill_the_disk(path, **_):
        path.write_bytes(b"\x89PNG half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_suffix_decides_the_format(tmp_path):
    save_figure(make_figure(1, 1), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        save_figure(make_figure(1, 1), tmp_path / "a.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_svg_is_the_same_twice_and_needs_no_font():
    first, second = (render_svg(draw(LIGHT)) for _ in range(2))
    assert first == second
    assert "<text" not in first and "http" not in first.split("<defs>", 1)[1]


# The look of an axis


def test_parts_do_not_overlap(tmp_path):
    figure = make_figure(4, 2)
    left, right = figure.subplots(1, 2)
    left.set_ylabel("a label that needs room")
    right.set_ylabel("another one")
    save_figure(figure, tmp_path / "a.png")
    box, other = left.get_tightbbox(), right.get_tightbbox()
    assert 0 < box.x0 < box.x1 < other.x0 < other.x1 < 4 * 180


@pytest.mark.parametrize("grid", ["x", "y"])
def test_a_dressed_axis(grid):
    with LIGHT.context():
        panel = make_figure(2, 2).subplots()
        dress(panel, "Quality", grid=grid)
    assert (panel.get_title(loc="left"), panel.get_title()) == ("Quality", "")
    shown = {side for side, spine in panel.spines.items() if spine.get_visible()}
    assert shown == {"left", "bottom"}
    assert all(line.get_visible() == (grid == "y") for line in panel.get_ygridlines())
    assert all(line.get_visible() == (grid == "x") for line in panel.get_xgridlines())
    assert panel.get_axisbelow() is True


@pytest.mark.parametrize("name", ["_hidden", "plain", ""])
def test_every_name_is_in_the_legend(name):
    assert not legend_label(name).startswith("_")
    assert legend_label(name).strip() == name


def test_pyplot_is_never_imported(tmp_path):
    code = (
        "import sys; import bge_pruning.utils.visualization as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"f.save_figure(f.make_figure(1, 1), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_named_colours_are_those_that_were_published():
    values = [value for name, value in vars(figures).items() if name.isupper()]
    named = {value for value in values if isinstance(value, str) and value.startswith("#")}
    assert named == OKABE_ITO - {"#000000"}
