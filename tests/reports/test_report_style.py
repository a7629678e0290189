from bge_pruning.reports.report_style import STYLE
from bge_pruning.utils.visualization import DARK, LIGHT


def test_the_page_has_the_colours_of_its_pictures():
    light, _, dark = STYLE.partition("@media screen and (prefers-color-scheme: dark)")
    assert f"--surface: {LIGHT.surface};" in light and f"--ink: {LIGHT.ink};" in light
    assert f"--surface: {DARK.surface};" in dark and f"--ink: {DARK.ink};" in dark
    # Everything else goes by these names: no rule is left out in one of the two.
    assert "#" not in dark.partition("}")[2]


def test_braces_are_balanced():
    assert STYLE.count("{") == STYLE.count("}") > 30


def test_paper_is_cared_for():
    assert "@media print" in STYLE
