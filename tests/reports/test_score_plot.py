"""Scores as dots: where they stand, and what is written beside them."""

import pytest

from bge_pruning.reports.score_plot import count_rows, draw_scores
from bge_pruning.utils.records import Entry
from bge_pruning.utils.visualization import DARK, LIGHT

MODES = ("dense", "sparse", "colbert", "dense+sparse", "all")


def draw(*entries, theme=LIGHT):
    return draw_scores([Entry.model_validate(entry) for entry in entries], theme)


def points(figure, label):
    found = [c for c in figure.axes[0].collections if c.get_label() == label]
    return [tuple(point) for collection in found for point in collection.get_offsets().tolist()]


def labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def legend(figure):
    return [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]


def test_a_score_beside_others_and_tasks_of_several_modes(make_entry, said):
    figure = draw(make_entry(), make_entry("other", interval=[0.5, 0.9], also={}))
    assert points(figure, "this model") == [(0.81, 0), (0.81, 1)]
    assert points(figure, "original") == [(0.82, 0), (0.82, 1)]
    assert points(figure, "floor") == [(0.51, 0), (0.51, 1)]
    assert points(figure, "pruned, before recovery") == [(0.75, 0)]
    assert labels(figure) == ["stsb-en-test, Spearman, dense", "other, Spearman, dense"]
    assert "0.810" in said(figure) and "98.8%" in said(figure)
    bars = [bar for bar in figure.axes[0].collections if hasattr(bar, "get_segments")]
    segments = [segment.tolist() for bar in bars for segment in bar.get_segments()]
    assert [[0.79, 0.0], [0.83, 0.0]] in segments  # the interval, behind the dot
    assert [[0.5, 1.0], [0.9, 1.0]] in segments
    low, high = figure.axes[0].get_ylim()
    assert low > high  # the first score is on top
    entries = [make_entry("a"), make_entry("a", "sparse"), make_entry("b", metric="ndcg_at_10")]
    figure = draw(*entries)
    assert labels(figure) == ["a, Spearman", "dense", "sparse", "b, nDCG@10, dense"]
    weights = [label.get_fontweight() for label in figure.axes[0].get_yticklabels()]
    assert weights == ["bold", "normal", "normal", "normal"]
    assert [place for _, place in points(figure, "this model")] == [1, 2, 3]
    assert count_rows([Entry.model_validate(entry) for entry in entries]) == 4


def test_any_number_of_rows_is_legible_and_of_the_same_height(make_entry, assert_legible):
    heights = []
    for count, theme in ((1, LIGHT), (5, LIGHT), (30, DARK)):
        entries = [make_entry(f"task-{n // 5}", MODES[n % 5]) for n in range(count)]
        figure = draw(*entries, theme=theme)
        assert_legible(figure)
        assert len(points(figure, "this model")) == count
        panel = figure.axes[0]
        bottom, top = panel.get_ylim()
        heights.append(panel.get_window_extent().height / (bottom - top) / figure.dpi)
    assert heights[1:] == pytest.approx([0.3, 0.3], abs=0.06)


def test_the_unknown_is_left_out_and_models_keep_marker_and_name(make_entry, said, assert_legible):
    alone = {"baseline": None, "retention": None, "retention_above_floor": None}
    figure = draw(make_entry(**alone, also={"gone": None}))
    assert legend(figure) == ["floor", "this model"]
    assert "kept" not in said(figure)
    figure = draw(make_entry(), make_entry("b", baseline=-0.1, retention=None))
    assert said(figure).count("%") == 2  # one retention, and the title
    models = {f"model {index}": index / 10 for index in range(7)}
    figure = draw(make_entry(also=models), make_entry("b", also={"model 3": 0.9}))
    for name, value in models.items():
        assert points(figure, name)[0] == (value, 0)
    assert points(figure, "model 3")[1] == (0.9, 1)
    names = ["$x^$", "_a", "<b>&|", "модель"]
    figure = draw(*(make_entry(name, also={name: 0.5}) for name in names))
    for name in names:
        assert f"{name}, Spearman, dense" in said(figure)
        assert name in legend(figure)
    assert_legible(figure)
