import pytest

from bge_pruning.reports import history_plot
from bge_pruning.reports.report_data import HistoryRow, collect_series
from bge_pruning.utils.visualization import AXIS_TITLES, DARK, LIGHT, THEMES


@pytest.fixture
def series(make_history):
    return collect_series([HistoryRow.model_validate(row) for row in make_history()])


def titles(figure):
    return [panel.get_title(loc="left") for panel in figure.axes]


def curves(panel):
    return {line.get_label(): line.get_data() for line in panel.lines}


def test_constraint_and_multipliers_have_a_panel_or_curve_for_each_axis(series, said):
    figure = history_plot.draw_constraint(series)
    assert titles(figure) == ["Removed attention heads (%)", "Removed encoder parameters (%)"]
    head = curves(figure.axes[0])
    assert set(head) == {"expected by the gates", "target", "what a cut would remove"}
    batches, percent = head["expected by the gates"]
    assert list(batches) == list(range(1, 40))
    assert percent[19] == pytest.approx(49)
    assert set(head["what a cut would remove"][1]) == {50}
    assert "target" not in curves(figure.axes[1])
    assert said(figure).count("expected by the gates") == 1  # one legend for all
    figure = history_plot.draw_multipliers(series)
    assert [title.split()[-1] for title in titles(figure)] == ["(lambda_1)", "(lambda_2)"]
    for panel, slope in zip(figure.axes, (0.1, 0.2), strict=True):
        ((name, (batches, values)),) = curves(panel).items()
        assert name == "attention heads"
        assert list(values) == pytest.approx([slope * batch for batch in batches])


def test_training_has_scores_and_losses_on_a_scale_that_fits(series, said):
    figure = history_plot.draw_training(series)
    assert titles(figure) == ["Task loss: median and most values", "Scores while training"]
    losses, scores = figure.axes
    # Not the total: it holds the constraint too, and would hide the task's loss.
    assert set(curves(losses)) == {"distillation alignment"} and "total" not in said(figure)
    assert list(curves(scores)["dev"][1]) == pytest.approx([0.7, 0.8, 0.9])
    _, middle = losses.lines[0].get_data()
    values = series["loss/train/distillation_alignment"][1]
    assert middle[20] == pytest.approx(values[20])  # it falls steadily
    (band,) = losses.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() < middle.min() and heights.max() > middle.max()
    series = {"loss/train/a": (list(range(50)), [10.0**-n for n in range(50)])}
    figure = history_plot.draw_training(series)
    figure.draw_without_rendering()
    assert figure.axes[0].get_yscale() == "log"
    assert "mathdefault" not in said(figure)
    with_zero = {"loss/train/a": ([0, 1], [0.0, 9.0])}
    assert history_plot.draw_training(with_zero).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_axes_is_legible(count, assert_legible):
    axes = [*AXIS_TITLES, "a", "b"][:count]
    series = {f"pruning/lambda_1/{axis}": ([0, 15000], [0.0, -3.0]) for axis in axes}
    for axis in axes:
        for key in ("expected_sparsity", "target_sparsity", "realised_sparsity"):
            series[f"pruning/{key}/{axis}"] = ([0, 7500, 15000], [0.0, 0.2, 0.4])
    assert_legible(history_plot.draw_constraint(series))
    assert_legible(history_plot.draw_multipliers(series))


def test_many_losses_are_told_apart_and_none_is_left_out(assert_legible):
    names = [f"part_{index}" for index in range(9)] + ["_private", "$x$"]
    series = {f"loss/train/{name}": ([0, 1, 2], [1.0, 2.0, 3.0]) for name in names}
    figure = history_plot.draw_training(series)
    lines = figure.axes[0].lines
    assert len({(line.get_color(), str(line.get_linestyle())) for line in lines[:10]}) == 10
    shown = [text.get_text().strip() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == [name.replace("_", " ").strip() for name in names]


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark"])
def test_curves_have_the_colours_of_the_theme(theme, series):
    assert history_plot.has_training(series) and history_plot.has_multipliers(series)
    assert not history_plot.has_training({}) and not history_plot.has_multipliers({})
    figure = history_plot.draw_constraint(series, theme)
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert colours["expected by the gates"] == theme.series[0]
    assert colours["target"] == theme.muted
    other = DARK if theme is LIGHT else LIGHT
    assert other.ink not in {text.get_color() for text in figure.legends[0].get_texts()}
