"""What a person reads in the terminal after an evaluation."""

import copy
import io
import json

import pytest
from rich.console import Console

from bge_pruning.utils.console import show_evaluation
from bge_pruning.utils.evaluation import evaluate

TASK = {
    "task": "stsb-en-test",
    "value": 0.81236,
    "baseline": 0.84,
    "floors": {"random_weights": 0.43, "word_embeddings": 0.612},
    "retention": 0.9671,
    "retention_above_floor": 0.8784,
    "also": {"before recovery": 0.75},
}
MODEL = {"encoder": 2_000_000, "embeddings": 3_000, "pooler": 10, "heads": 5, "total": 2_003_015}
BASELINE = {"encoder": 8_000_000, "embeddings": 6_000, "pooler": 40, "heads": 0, "total": 8_006_040}
SPEED = {
    "latency_ms": {"model": {"median": 5.04}, "baseline": {"median": 9.96}, "ratio": 0.506},
    "throughput_texts_per_s": {"model": 200.4, "baseline": 99.6, "ratio": 2.012},
}


@pytest.fixture
def result() -> dict:
    second = {**TASK, "task": "stsb-de-test", "value": 0.5, "retention_above_floor": None}
    return copy.deepcopy(
        {
            "tasks": [TASK, second],
            "parameters": {"model": MODEL, "baseline": BASELINE},
            "speed": SPEED,
        }
    )


def show(result: dict, width: int = 100) -> str:
    stream = io.StringIO()
    show_evaluation(result, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def read_rows(text: str) -> list[list[str]]:
    """The cells of every table row; the borders are drawn in two styles."""
    lines = [line.replace("┃", "│") for line in text.splitlines()]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if "│" in line]


def test_scores_and_parameters_stand_in_their_rows(result):
    assert read_rows(show(result)) == [
        ["cosine Spearman (dense)", "stsb-en-test", "stsb-de-test"],
        ["baseline", "0.8400", "0.8400"],
        ["before recovery", "0.7500", "0.7500"],
        ["model", "0.8124", "0.5000"],
        ["floor: random weights", "0.4300", "0.4300"],
        ["floor: word embeddings", "0.6120", "0.6120"],
        ["kept of the baseline", "96.7%", "96.7%"],
        ["kept above the floor", "87.8%", "-"],
        ["parameters", "baseline", "model", "kept"],
        ["encoder", "8,000,000", "2,000,000", "25.0%"],
        ["embeddings", "6,000", "3,000", "50.0%"],
        ["pooler", "40", "10", "25.0%"],
        ["heads", "0", "5", ""],
        ["total", "8,006,040", "2,003,015", "25.0%"],
    ]


def test_speed_is_one_line_however_narrow_the_terminal(result):
    expected = (
        "one text: 5.0 ms, baseline 10.0 ms; texts per second: 200, baseline 100 (2.01 times)\n"
    )
    assert show(result, width=40).endswith(expected)


def test_speed_that_was_not_measured(result):
    result["speed"] = None
    assert "one text" not in show(result)


def test_without_a_baseline(result):
    result["parameters"]["baseline"] = None
    result["speed"] = None
    for task in result["tasks"]:
        task.update(baseline=None, retention=None, retention_above_floor=None)
        del task["also"]
    rows = read_rows(show(result))
    assert rows[1:3] == [["baseline", "-", "-"], ["model", "0.8124", "0.5000"]]
    assert rows[5:7] == [["kept of the baseline", "-", "-"], ["kept above the floor", "-", "-"]]
    assert rows[7:9] == [["parameters", "model"], ["encoder", "2,000,000"]]


def test_what_evaluate_returns_can_be_shown(tiny_folder, pairs):
    result = evaluate(str(tiny_folder), None, {"six": pairs}, device="cpu")
    text = show(json.loads(json.dumps(result)))
    assert ["model", f"{result['tasks'][0]['value']:.4f}"] in read_rows(text)


def test_nothing_but_text_goes_to_a_file(result):
    assert "\x1b" not in show(result)


@pytest.mark.parametrize("name", ["stsb[en]", "a[/b]"])
def test_names_with_brackets_are_printed_as_they_are(name, result):
    for task in result["tasks"]:
        task["also"] = {name: 0.25}
    result["tasks"][0]["task"] = name
    rows = read_rows(show(result))
    assert rows[0][1] == name
    assert [name, "0.2500", "0.2500"] in rows


@pytest.mark.parametrize("name", ["baseline", "model", "kept of the baseline"])
def test_another_model_does_not_hide_a_row_of_its_name(name, result):
    for task in result["tasks"]:
        task["also"] = {name: 0.25}
    rows = read_rows(show(result))
    assert [name, "0.2500", "0.2500"] in rows
    assert ["baseline", "0.8400", "0.8400"] in rows
    assert ["model", "0.8124", "0.5000"] in rows
    assert ["kept of the baseline", "96.7%", "96.7%"] in rows
