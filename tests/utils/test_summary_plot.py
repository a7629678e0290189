"""The bars of the summary against the numbers they stand for."""

import copy
from itertools import pairwise

import pytest
from PIL import Image

from bge_pruning.utils import summary_plot
from bge_pruning.utils.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from bge_pruning.utils.summary_plot import plot_summary

PARTS = ("encoder", "embeddings", "pooler", "heads", "total")
RESULT = {
    "tasks": [
        {
            "task": "en",
            "value": 0.81,
            "baseline": 0.84,
            "floor": 0.6,
            "retention": 0.9643,
            "also": {"before recovery": 0.7},
        },
        {
            "task": "de",
            "value": 0.5,
            "baseline": -0.2,
            "floor": 0.4,
            "retention": None,
            "also": {"before recovery": 0.3},
        },
    ],
    "parameters": {
        "model": dict(zip(PARTS, (3_000_000, 2_000_000, 30_000, 20_000, 5_050_000), strict=True)),
        "baseline": dict(
            zip(PARTS, (7_000_000, 2_500_000, 300_000, 200_000, 10_000_000), strict=True)
        ),
    },
    "speed": {
        "device": "cuda:0",
        "threads": 3,
        "latency_ms": {
            "model": {"median": 4.0},
            "baseline": {"median": 5.0},
            "ratio": 0.8,
            "ratio_iqr": [0.625, 1.25],
        },
        "throughput_texts_per_s": {
            "model": 250.0,
            "baseline": 100.0,
            "ratio": 2.5,
            "ratio_iqr": [2.25, 2.6],
        },
    },
}


@pytest.fixture
def result() -> dict:
    return copy.deepcopy(RESULT)


@pytest.fixture
def panels(monkeypatch):
    """A function from an evaluation to the axes of the figure that would be saved."""
    saved = []
    monkeypatch.setattr(summary_plot, "save_figure", lambda figure, path: saved.append(figure))

    def draw(result: dict) -> list:
        plot_summary(result, "unused.png")
        return saved[-1].axes

    return draw


def without_baseline(result: dict) -> dict:
    for task in result["tasks"]:
        task.update(baseline=None, retention=None)
    result["parameters"]["baseline"] = None
    return {**result, "speed": None}


def heights(panel) -> dict[str, list[float]]:
    """Height of the bars under each name of the legend."""
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in panel.containers}


def colours(panel) -> dict[str, str]:
    from matplotlib.colors import to_hex

    return {bars.get_label(): to_hex(bars[0].get_facecolor()).upper() for bars in panel.containers}


def annotations(panel) -> list[str]:
    return [text.get_text() for text in panel.texts]


# Quality


def test_each_score_has_its_bar_and_its_number(panels, result):
    quality = panels(result)[0]
    assert heights(quality) == {
        "original": [0.84, -0.2],
        "before recovery": [0.7, 0.3],
        "pruned": [0.81, 0.5],
    }
    assert colours(quality) == {"original": GREY, "before recovery": ORANGE, "pruned": BLUE}
    expected = ["0.840", "-0.200", "0.700", "0.300", "0.810", "0.500"]
    assert annotations(quality) == expected
    assert quality.get_title(loc="left") == "Quality: cosine Spearman"


def test_bars_stand_side_by_side_around_their_task(panels, result):
    quality = panels(result)[0]
    for index in range(2):
        bars = sorted((group[index] for group in quality.containers), key=lambda bar: bar.get_x())
        edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
        assert all(left[1] < right[0] for left, right in pairwise(edges))
        assert (edges[0][0] + edges[-1][1]) / 2 == pytest.approx(index)
        assert index - 0.5 < edges[0][0] and edges[-1][1] < index + 0.5
    assert [group.get_label() for group in quality.containers] == [
        "original",
        "before recovery",
        "pruned",
    ]


def test_the_floor_is_a_line_across_the_bars_of_its_task(panels, result):
    quality = panels(result)[0]
    (lines,) = quality.collections
    for index, (segment, floor) in enumerate(zip(lines.get_segments(), (0.6, 0.4), strict=True)):
        assert segment[:, 1].tolist() == [floor, floor]
        bars = [group[index] for group in quality.containers]
        assert segment[0, 0] < min(bar.get_x() for bar in bars)
        assert segment[1, 0] > max(bar.get_x() + bar.get_width() for bar in bars)


def test_the_legend_ends_with_the_floor(panels, result):
    legend = panels(result)[0].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["original", "before recovery", "pruned", "floor"]
    swatches = [type(handle).__name__ for handle in legend.legend_handles]
    assert swatches == [*["Rectangle"] * 3, "Line2D"]


def test_tasks_say_what_was_kept(panels, result):
    quality = panels(result)[0]
    assert quality.get_xticks().tolist() == [0, 1]
    assert [label.get_text() for label in quality.get_xticklabels()] == ["en\n96.4% kept", "de"]


@pytest.mark.parametrize(
    ("value", "baseline", "floor"), [(0.8, 0.9, 0.5), (-0.3, 0.9, 0.1), (-0.3, -0.2, -0.4)]
)
def test_every_score_lies_inside_the_panel(value, baseline, floor, panels, result):
    result["tasks"] = [{**result["tasks"][0], "value": value, "baseline": baseline, "floor": floor}]
    result["tasks"][0]["also"] = {}
    low, high = panels(result)[0].get_ylim()
    assert low <= min(0, value, baseline, floor)
    assert high >= max(0, value, baseline, floor)
    assert low < high


def test_several_more_models_have_a_bar_and_a_colour_each(panels, result):
    for task in result["tasks"]:
        task["also"] = {"one": 0.1, "two": 0.2, "three": 0.3}
    drawn = colours(panels(result)[0])
    assert drawn == {"original": GREY, "one": ORANGE, "two": PURPLE, "three": GREEN, "pruned": BLUE}


def test_no_model_is_left_out(panels, result):
    models = {f"model {index}": index / 10 for index in range(5)}
    for task in result["tasks"]:
        task["also"] = models
    drawn = heights(panels(result)[0])
    assert {name: values[0] for name, values in drawn.items() if name in models} == models


@pytest.mark.parametrize("name", ["original", "pruned"])
def test_another_model_does_not_hide_a_bar_of_its_name(name, panels, result):
    for task in result["tasks"]:
        task["also"] = {name: 0.1}
    first = sorted(group[0].get_height() for group in panels(result)[0].containers)
    assert first == [0.1, 0.81, 0.84]


# Parameters


def test_parameters_are_stacked_to_the_total(panels, result):
    parameters = panels(result)[1]
    expected = {"encoder": [7, 3], "embeddings": [2.5, 2], "pooler + heads": [0.5, 0.05]}
    drawn = heights(parameters)
    assert drawn.keys() == expected.keys()
    for name, values in expected.items():
        assert drawn[name] == pytest.approx(values)
    for index, total in enumerate((10, 5.05)):
        stack = [group[index] for group in parameters.containers]
        bottom = 0.0
        for bar in stack:
            assert bar.get_y() == pytest.approx(bottom)
            bottom += bar.get_height()
        assert bottom == pytest.approx(total)
    assert [label.get_text() for label in parameters.get_xticklabels()] == ["original", "pruned"]
    assert parameters.get_ylim() == pytest.approx((0, 11.3))


def test_thin_parts_have_no_number_and_totals_always_one(panels, result):
    parameters = panels(result)[1]
    # 0.5 of 10 million is too thin; so is 0.05.
    expected = ["7.0", "3.0", "2.5", "2.0", "", "", "10.0 M", "5.0 M"]
    assert annotations(parameters) == expected


# Speed


def test_speed_is_shown_as_times_the_original(panels, result):
    speed = panels(result)[2]
    bars = next(group for group in speed.containers if group.get_label() == "_container1")
    assert [bar.get_height() for bar in bars] == pytest.approx([2.5, 1.25])  # 1 / 0.8
    assert annotations(speed) == ["2.50 x", "1.25 x"]
    (line,) = [line for line in speed.lines if list(line.get_ydata()) == [1, 1]]
    assert line.get_color() == GREY
    labels = [label.get_text() for label in speed.get_xticklabels()]
    assert labels == ["batches of 32\n100 to 250 texts/s", "one text\n5.0 to 4.0 ms"]
    assert speed.get_xlabel() == "on cuda:0, 3 threads; line: original"


def whiskers(speed) -> list[list[float]]:
    (drawn,) = speed.collections
    return [segment[:, 1].tolist() for segment in drawn.get_segments()]


def test_whiskers_are_the_quartiles(panels, result):
    speed = panels(result)[2]
    # Of the latency the reciprocals, in the other order: 1 / 1.25 and 1 / 0.625.
    assert whiskers(speed) == [pytest.approx([2.25, 2.6]), pytest.approx([0.8, 1.6])]
    assert speed.get_ylim() == pytest.approx((0, 1.15 * 2.6))


def test_a_median_outside_its_quartiles_is_drawn(panels, result):
    """The ratio of the medians need not lie between the quartiles of the ratios."""
    result["speed"]["throughput_texts_per_s"]["ratio_iqr"] = [2.55, 2.6]
    result["speed"]["latency_ms"]["ratio_iqr"] = [0.9, 1.0]
    drawn = whiskers(panels(result)[2])
    assert drawn == [pytest.approx([2.5, 2.6]), pytest.approx([1, 1.25])]


def test_a_slower_model_still_shows_the_line_of_the_original(panels, result):
    result["speed"]["throughput_texts_per_s"].update(ratio=0.3, ratio_iqr=[0.2, 0.4])
    result["speed"]["latency_ms"].update(ratio=4.0, ratio_iqr=[3.0, 5.0])
    assert panels(result)[2].get_ylim() == pytest.approx((0, 1.15))


# What is not there, and the file


def test_without_a_baseline_there_is_only_the_pruned_model(panels, result):
    quality, parameters = panels(without_baseline(result))
    assert list(heights(quality)) == ["before recovery", "pruned"]
    assert [label.get_text() for label in quality.get_xticklabels()] == ["en", "de"]
    assert [label.get_text() for label in parameters.get_xticklabels()] == ["pruned"]
    assert parameters.get_ylim()[1] == pytest.approx(1.13 * 5.05)


def test_a_result_written_before_other_models_were_scored(panels, result):
    for task in result["tasks"]:
        del task["also"]
    assert list(heights(panels(result)[0])) == ["original", "pruned"]


@pytest.mark.parametrize("tasks", [1, 6])
def test_the_picture_grows_with_its_tasks(tasks, result, tmp_path):
    result["tasks"] = result["tasks"][:1] * tasks
    path = tmp_path / "new" / "summary.png"
    plot_summary(result, path)
    with Image.open(path) as image:
        # Three bars and a gap take 1.55 inches a task, at least 3.9 in all; 7.6 for the rest.
        assert image.width == pytest.approx(180 * (max(3.9, 1.55 * tasks) + 7.6), abs=1)
    assert [file.name for file in path.parent.iterdir()] == ["summary.png"]


def test_an_evaluation_without_a_task_is_refused(result, tmp_path):
    result["tasks"] = []
    message = r"the evaluation has no task to draw\. To fix, evaluate on at least one STS file"
    with pytest.raises(ValueError, match=message):
        plot_summary(result, tmp_path / "summary.png")
    assert not list(tmp_path.iterdir())
