"""The panels of the summary against the numbers they stand for."""

import pytest

from bge_pruning.reports import summary_plot
from bge_pruning.utils.records import EvaluationRecord
from bge_pruning.utils.visualization import DARK, LIGHT


@pytest.fixture
def result(make_record, make_entry):
    return make_record([make_entry(), make_entry(mode="sparse")])


def titles(figure):
    return [panel.get_title(loc="left") for panel in figure.axes]


def test_three_panels(result, make_entry, said):
    other = make_entry("other", main=False, metric="cosine_pearson")
    result.tasks.append(result.tasks[0].model_validate(other))
    figure = summary_plot.draw_summary(result)
    assert titles(figure) == ["What is left", "Parameters (millions)", "What was gained"]
    assert "stsb-en-test, Spearman" in said(figure) and "98.8%" in said(figure)
    assert "other" not in said(figure)  # it does not decide
    parameters, gains = figure.axes[1:]
    # Parameters are stacked to the total; thin parts have no number, and totals always have one.
    drawn = {bars.get_label(): [bar.get_height() for bar in bars] for bars in parameters.containers}
    assert drawn["encoder"] == [4, 2] and drawn["embeddings"] == [3, 3]
    assert drawn["pooler + heads"] == pytest.approx([0.001, 0.001])
    for index, total in enumerate((7.001, 5.001)):
        bottom = 0.0
        for bars in parameters.containers:
            assert bars[index].get_y() == pytest.approx(bottom)
            bottom += bars[index].get_height()
        assert bottom == pytest.approx(total)
    assert [label.get_text() for label in parameters.get_xticklabels()] == ["original", "pruned"]
    numbers = [text.get_text() for text in parameters.texts]
    assert numbers == ["4.0", "2.0", "3.0", "3.0", "", "", "7.0 M", "5.0 M"]
    # Gains are bars with the quartiles as whiskers.
    assert [bar.get_width() for bar in gains.patches] == [1.8, 2.0, 1.4, 1.6]
    whiskers = [line.get_segments()[0][:, 0].tolist() for line in gains.collections]
    assert whiskers == [[1.7, 1.9], pytest.approx([1.6, 2.5])]
    assert [text.get_text() for text in gains.texts] == ["1.80 x", "2.00 x", "1.40 x", "1.60 x"]
    assert gains.get_xlim()[1] > 2.5
    assert gains.get_xlabel() == "times better than the original (dashed)\non cpu, 2 threads"
    result.speed.load = "other programs kept 1.2 of 2 cores busy, so that times are too long"
    said_below = summary_plot.draw_summary(result).axes[2].get_xlabel()
    assert max(map(len, said_below.splitlines())) <= summary_plot.WIDTH and "too long" in said_below


def test_gains_are_times_better_than_the_original(result):
    # Time and size shrink by what is kept: 1 / 0.5, 28 / 20, (28 + 12) / (20 + 5).
    assert summary_plot.compute_gains(result) == [
        summary_plot.Gain("more texts per second", 1.8, (1.7, 1.9)),
        summary_plot.Gain("faster for one text", 2.0, (1.6, 2.5)),
        summary_plot.Gain("smaller on disk", 1.4),
        summary_plot.Gain("less memory", 1.6),
    ]
    # What was not measured is not a gain.
    result.speed.memory_bytes.model["activations"] = None  # ONNX Runtime does not report it
    assert "less memory" not in [gain.name for gain in summary_plot.compute_gains(result)]
    result.size_bytes["baseline"] = None
    result.speed.latency_ms.ratio_iqr = None
    rate = summary_plot.Gain("more texts per second", 1.8, (1.7, 1.9))
    assert summary_plot.compute_gains(result) == [
        rate,
        summary_plot.Gain("faster for one text", 2.0),
    ]
    result.speed = result.size_bytes = None
    assert summary_plot.compute_gains(result) == []


def test_slower_models_and_panels_without_numbers(result, make_record):
    speed = result.speed
    speed.throughput_texts_per_s.ratio, speed.throughput_texts_per_s.ratio_iqr = 0.3, [0.2, 0.4]
    speed.latency_ms.ratio, speed.latency_ms.ratio_iqr = 4.0, [3.0, 5.0]
    result.size_bytes = None
    low, high = summary_plot.draw_summary(result).axes[2].get_xlim()
    assert low == 0 and high >= 1.25
    nothing = {"speed": None, "size_bytes": None}
    figure = summary_plot.draw_summary(make_record([], **nothing))
    assert titles(figure) == ["Parameters (millions)"]
    figure = summary_plot.draw_summary(make_record(parameters=None, speed=None))
    assert titles(figure) == ["What is left", "What was gained"]
    assert summary_plot.count_models(EvaluationRecord(tasks=[])) == {}
    assert not summary_plot.can_summarise(make_record([], parameters=None, **nothing))


@pytest.mark.parametrize(("count", "theme"), [(1, LIGHT), (30, DARK)])
def test_any_number_of_scores_is_legible(count, theme, make_record, make_entry, assert_legible):
    modes = ("dense", "sparse", "colbert", "dense+sparse", "all")
    result = make_record([make_entry(f"task-{n // 5}", modes[n % 5]) for n in range(count)])
    result.speed.device = "NVIDIA H100 80GB HBM3"
    figure = summary_plot.draw_summary(result, theme)
    assert_legible(figure)
    rest = ", the first 8 of 30" if count == 30 else ""
    assert titles(figure)[0] == f"What is left{rest}"
