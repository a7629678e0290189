import pytest

from bge_pruning.reports.report_data import read_inputs
from bge_pruning.reports.report_pictures import CAPTIONS, draw_pictures, find_pictures
from bge_pruning.utils.visualization import DARK, LIGHT


def test_every_picture_in_both_themes(inputs):
    pictures = draw_pictures(inputs)
    assert list(pictures) == list(CAPTIONS)
    for picture in pictures.values():
        assert LIGHT.surface.lower() in picture.light and DARK.surface.lower() in picture.dark
        assert DARK.surface.lower() not in picture.light
        assert picture.light.count("<path") == picture.dark.count("<path")


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("evaluation.json", {"summary.png", "scores.png"}),
        ("metrics.jsonl", {"constraint.png", "multipliers.png", "training.png"}),
        ("metrics-recovery.jsonl", {"recovery.png"}),
        ("gates.npz", {"gates.png"}),
        ("pruning.json", set()),
    ],
)
def test_a_picture_needs_its_file(missing, gone, results):
    (results / missing).unlink()
    assert set(CAPTIONS) - set(find_pictures(read_inputs(results))) == gone


def test_an_evaluation_without_anything_to_draw(inputs):
    inputs.evaluation = {"tasks": [], "parameters": {"model": None, "baseline": None}}
    assert not {"summary.png", "scores.png"} & set(find_pictures(inputs))


def test_a_run_without_gates_has_losses_only(inputs):
    inputs.gates, inputs.evaluation, inputs.recovery = {}, None, {}
    inputs.series = {"loss/train/total": ([0, 1], [2.0, 1.0])}
    assert list(find_pictures(inputs)) == ["training.png"]
