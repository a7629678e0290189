"""Size, look and saving of pictures, read back from the file."""

import subprocess
import sys

import pytest
from PIL import Image

from bge_pruning.utils import figures
from bge_pruning.utils.figures import dress, make_figure, save_figure

# As published: Okabe and Ito, "Color Universal Design" (2008); black and yellow are not used.
OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"}


@pytest.mark.parametrize(("width", "height"), [(4.0, 3.0), (7.5, 2.5)])
def test_image_has_the_size_in_inches_times_180(width, height, tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    save_figure(make_figure(width, height), path)
    with Image.open(path) as image:
        assert image.size == (round(width * 180), round(height * 180))
        assert image.info["dpi"] == pytest.approx((180, 180), abs=0.1)


def test_background_is_white_whatever_the_figure_says(tmp_path):
    figure = make_figure(1, 1)
    figure.set_facecolor("none")
    save_figure(figure, str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as image:
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


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


def test_the_suffix_decides_the_format(tmp_path):
    save_figure(make_figure(1, 1), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        save_figure(make_figure(1, 1), tmp_path / "a.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]


def test_parts_do_not_overlap(tmp_path):
    figure = make_figure(4, 2)
    left, right = figure.subplots(1, 2)
    left.set_ylabel("a label that needs room")
    right.set_ylabel("another one")
    save_figure(figure, tmp_path / "a.png")
    box, other = left.get_tightbbox(), right.get_tightbbox()
    assert 0 < box.x0 < box.x1 < other.x0 < other.x1 < 4 * 180


def test_a_dressed_axis():
    panel = make_figure(2, 2).subplots()
    dress(panel, "Quality")
    assert (panel.get_title(loc="left"), panel.get_title()) == ("Quality", "")
    shown = {side for side, spine in panel.spines.items() if spine.get_visible()}
    assert shown == {"left", "bottom"}
    assert all(line.get_visible() for line in panel.get_ygridlines())
    assert not any(line.get_visible() for line in panel.get_xgridlines())
    assert panel.get_axisbelow() is True


def test_colours_are_those_that_colour_blind_readers_can_tell_apart():
    values = [value for name, value in vars(figures).items() if name.isupper()]
    colours = [value for value in values if str(value).startswith("#")]
    assert len(colours) == 7
    assert set(colours) == {figures.GREY, *OKABE_ITO}


def test_pyplot_is_never_imported(tmp_path):
    code = (
        "import sys; import bge_pruning.utils.figures as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"f.save_figure(f.make_figure(1, 1), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
