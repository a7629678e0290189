import pytest

from bge_pruning.reports.score_plot import count_rows, draw_scores
from bge_pruning.utils.visualization import THEMES

MODES = ("dense", "sparse", "colbert", "dense+sparse", "all")


@pytest.fixture
def many(make_entry):
    """A function that makes scores: six tasks in all modes, or fewer."""

    def make(count: int) -> list[dict]:
        return [
            make_entry(f"task-{index // 5}", MODES[index % 5], value=0.6 + index / 100)
            for index in range(count)
        ]

    return make


def points(figure, label):
    """Where the markers with a name in the legend stand."""
    found = [c for c in figure.axes[0].collections if c.get_label() == label]
    return [tuple(point) for collection in found for point in collection.get_offsets().tolist()]


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_a_score_stands_beside_the_original_the_floor_and_other_models(make_entry, said):
    figure = draw_scores([make_entry()])
    assert points(figure, "this model") == [(0.81, 0)]
    assert points(figure, "original") == [(0.82, 0)]
    assert points(figure, "floor") == [(0.51, 0)]
    assert points(figure, "pruned, before recovery") == [(0.75, 0)]
    assert labels(figure) == ["stsb-en-test, Spearman, dense"]
    assert "0.810" in said(figure) and "98.8%" in said(figure)


def test_the_interval_is_a_bar_behind_the_dot(make_entry):
    figure = draw_scores([make_entry(), make_entry("other", interval=[0.5, 0.9])])
    bars = figure.axes[0].collections
    segments = [
        s.tolist() for bar in bars if hasattr(bar, "get_segments") for s in bar.get_segments()
    ]
    assert [[0.79, 0.0], [0.83, 0.0]] in segments
    assert [[0.5, 1.0], [0.9, 1.0]] in segments


def test_a_task_of_several_modes_has_a_heading(make_entry):
    scores = [make_entry("a"), make_entry("a", "sparse"), make_entry("b", metric="ndcg_at_10")]
    figure = draw_scores(scores)
    assert labels(figure) == ["a, Spearman", "dense", "sparse", "b, nDCG@10, dense"]
    weights = [label.get_fontweight() for label in figure.axes[0].get_yticklabels()]
    assert weights == ["bold", "normal", "normal", "normal"]
    assert [place for _, place in points(figure, "this model")] == [1, 2, 3]
    assert count_rows(scores) == 4


def test_the_first_score_is_on_top(many):
    low, high = draw_scores(many(3)).axes[0].get_ylim()
    assert low > high


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
@pytest.mark.parametrize("count", [1, 2, 6, 30])
def test_one_to_thirty_rows_are_legible(count, theme, many, assert_legible):
    figure = draw_scores(many(count), theme)
    assert_legible(figure)
    assert len(points(figure, "this model")) == count


def test_rows_keep_their_height_whatever_their_number(many):
    heights = []
    for count in (5, 30):
        figure = draw_scores(many(count))
        figure.draw_without_rendering()
        panel = figure.axes[0]
        bottom, top = panel.get_ylim()
        heights.append(panel.get_window_extent().height / (bottom - top) / figure.dpi)
    assert heights == pytest.approx([0.3, 0.3], abs=0.06)


def test_without_a_baseline(make_entry, said):
    alone = make_entry(baseline=None, retention=None, retention_above_floor=None, also={})
    figure = draw_scores([alone])
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["floor", "this model"]
    assert "kept" not in said(figure)


def test_a_retention_that_is_not_defined_is_left_empty(make_entry, said):
    figure = draw_scores([make_entry(), make_entry("b", baseline=-0.1, retention=None)])
    assert said(figure).count("%") == 2  # one retention, and the title


def test_several_models_keep_a_marker_each(make_entry):
    models = {f"model {index}": index / 10 for index in range(7)}
    figure = draw_scores([make_entry(also=models), make_entry("b", also={"model 3": 0.9})])
    for name, value in models.items():
        assert points(figure, name)[0] == (value, 0)
    assert points(figure, "model 3")[1] == (0.9, 1)


@pytest.mark.parametrize("name", ["$x^$", "_a", "<b>&|", "модель"])
def test_names_are_shown_as_they_are(name, make_entry, said, assert_legible):
    figure = draw_scores([make_entry(name, also={name: 0.5})])
    assert f"{name}, Spearman, dense" in said(figure)
    assert any(text.get_text().strip() == name for text in figure.axes[0].get_legend().get_texts())
    assert_legible(figure)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"no score to draw\. To fix, evaluate on at least one"):
        draw_scores([])
