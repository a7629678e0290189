"""The panels of the summary against the numbers they stand for."""

import pytest

from bge_pruning.reports.summary_plot import Gain, compute_gains, count_models, draw_summary
from bge_pruning.utils.visualization import THEMES


@pytest.fixture
def result(make_evaluation, make_entry):
    return make_evaluation([make_entry(), make_entry(mode="sparse")])


def titles(figure):
    return [panel.get_title(loc="left") for panel in figure.axes]


def test_three_panels(result, said):
    figure = draw_summary(result)
    assert titles(figure) == ["What is left", "Parameters (millions)", "What was gained"]
    assert "stsb-en-test, Spearman" in said(figure) and "98.8%" in said(figure)


# Parameters


def test_parameters_are_stacked_to_the_total(result):
    panel = draw_summary(result).axes[1]
    drawn = {bars.get_label(): [bar.get_height() for bar in bars] for bars in panel.containers}
    assert drawn["encoder"] == [4, 2] and drawn["embeddings"] == [3, 3]
    assert drawn["pooler + heads"] == pytest.approx([0.001, 0.001])
    for index, total in enumerate((7.001, 5.001)):
        bottom = 0.0
        for bars in panel.containers:
            assert bars[index].get_y() == pytest.approx(bottom)
            bottom += bars[index].get_height()
        assert bottom == pytest.approx(total)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["original", "pruned"]


def test_thin_parts_have_no_number_and_totals_always_one(result):
    numbers = [text.get_text() for text in draw_summary(result).axes[1].texts]
    assert numbers == ["4.0", "2.0", "3.0", "3.0", "", "", "7.0 M", "5.0 M"]


def test_only_known_parameters_are_drawn():
    assert count_models({"baseline": None, "model": {"total": 1}}) == {"pruned": {"total": 1}}
    assert count_models({"baseline": None, "model": None}) == {}


# Gains


def test_gains_are_times_better_than_the_original(result):
    # Time and size shrink by what is kept: 1 / 0.5, 28 / 20, (28 + 12) / (20 + 5).
    assert compute_gains(result) == [
        Gain("more texts per second", 1.8, (1.7, 1.9)),
        Gain("faster for one text", 2.0, (1.6, 2.5)),
        Gain("smaller on disk", 1.4),
        Gain("less memory", 1.6),
    ]


def test_gains_are_bars_with_the_quartiles_as_whiskers(result):
    panel = draw_summary(result).axes[2]
    assert [bar.get_width() for bar in panel.patches] == [1.8, 2.0, 1.4, 1.6]
    whiskers = [line.get_segments()[0][:, 0].tolist() for line in panel.collections]
    assert whiskers == [[1.7, 1.9], pytest.approx([1.6, 2.5])]
    assert [text.get_text() for text in panel.texts] == ["1.80 x", "2.00 x", "1.40 x", "1.60 x"]
    assert panel.get_xlim()[1] > 2.5
    assert panel.get_xlabel() == "times better than the original (dashed)\non cpu, 2 threads"


def test_what_onnx_runtime_does_not_tell_is_no_gain(result):
    result["speed"]["memory_bytes"]["model"]["activations"] = None
    assert "less memory" not in [gain.name for gain in compute_gains(result)]


def test_what_was_not_measured_is_no_gain(result):
    assert len(compute_gains({**result, "size_bytes": {"model": 1, "baseline": None}})) == 3
    del result["speed"]["memory_bytes"]
    assert [gain.name for gain in compute_gains({**result, "size_bytes": None})] == [
        "more texts per second",
        "faster for one text",
    ]
    assert compute_gains({**result, "speed": None, "size_bytes": None}) == []


def test_a_slower_model_still_shows_the_line_of_the_original(result):
    result["speed"]["throughput_texts_per_s"].update(ratio=0.3, ratio_iqr=[0.2, 0.4])
    result["speed"]["latency_ms"].update(ratio=4.0, ratio_iqr=[3.0, 5.0])
    low, high = draw_summary({**result, "size_bytes": None}).axes[2].get_xlim()
    assert low == 0 and high >= 1.25


# What is not there, and many scores


def test_panels_without_numbers_are_left_out(result):
    figure = draw_summary({**result, "tasks": [], "speed": None, "size_bytes": None})
    assert titles(figure) == ["Parameters (millions)"]
    nothing = {"baseline": None, "model": None}
    assert titles(draw_summary({**result, "parameters": nothing, "speed": None})) == [
        "What is left",
        "What was gained",
    ]


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
@pytest.mark.parametrize("count", [1, 8, 30])
def test_any_number_of_scores_is_legible(count, theme, result, make_entry, assert_legible):
    modes = ("dense", "sparse", "colbert", "dense+sparse", "all")
    tasks = [make_entry(f"task-{index // 5}", modes[index % 5]) for index in range(count)]
    result["speed"]["device"] = "NVIDIA H100 80GB HBM3"
    figure = draw_summary({**result, "tasks": tasks}, theme)
    assert_legible(figure)
    rest = ", the first 8 of 30" if count == 30 else ""
    assert titles(figure)[0] == f"What is left{rest}"


def test_scores_that_do_not_decide_are_not_drawn(result, make_entry):
    result["tasks"].append(make_entry("other", main=False, metric="cosine_pearson"))
    assert "other" not in [
        label.get_text() for label in draw_summary(result).axes[0].get_yticklabels()
    ]


def test_an_evaluation_without_anything_is_refused(result):
    empty = {"tasks": [], "parameters": {"baseline": None, "model": None}, "speed": None}
    with pytest.raises(ValueError, match=r"nothing to draw\. To fix, evaluate on at least one"):
        draw_summary({**result, **empty, "size_bytes": None})
