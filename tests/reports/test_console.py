"""What a person reads in the terminal after an evaluation."""

import copy
import io

import pytest
from rich.console import Console

from bge_pruning.reports.console import show_evaluation
from bge_pruning.utils.records import EvaluationRecord

MODEL = {"encoder": 2_000_000, "embeddings": 3_000, "pooler": 10, "heads": 5, "total": 2_003_015}
BASELINE = {"encoder": 8_000_000, "embeddings": 6_000, "pooler": 40, "heads": 0, "total": 8_006_040}
SPEED = {
    "latency_ms": {"model": {"median": 5.04}, "baseline": {"median": 9.96}, "ratio": 0.506},
    "throughput_texts_per_s": {"model": 200.4, "baseline": 99.6, "ratio": 2.012},
}


@pytest.fixture
def result(make_entry) -> dict:
    same = {"baseline": 0.84, "retention": 0.9671, "p_value": 0.04}
    same["also"] = {"before recovery": 0.75}
    floors = {"random_weights": 0.43, "word_embeddings": 0.612}
    retrieval = {"kind": "retrieval", "metric": "ndcg_at_10", "floors": {"random_weights": 0.43}}
    retrieval |= {"retention_above_floor": None, "truncated": 1234, "texts": 5678}
    tasks = [
        make_entry(value=0.81236, retention_above_floor=0.8784, floors=floors, **same),
        make_entry(value=0.8, metric="cosine_pearson", main=False, **same),
        make_entry("scifact", "sparse", value=0.5, **retrieval, **same),
    ]
    parameters = {"model": MODEL, "baseline": BASELINE}
    return copy.deepcopy({"tasks": tasks, "parameters": parameters, "speed": SPEED})


def show(result: dict, width: int = 130) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False)
    show_evaluation(EvaluationRecord.model_validate(result), console)
    return stream.getvalue()


def read_lines(text: str) -> list[list[str]]:
    """The words of every line without borders."""
    lines = text.splitlines()
    return [[word for word in line.split() if word[0] not in "┃│┏┡└━─"] for line in lines]


def test_scores_parameters_and_notes_whatever_the_width_or_without_a_baseline(result):
    lines = read_lines(show(result))
    dense = ["dense", "0.8400", "0.7500", "0.8124", "0.790", "to", "0.830", "0.4300", "0.6120"]
    sparse = ["sparse", "0.8400", "0.7500", "0.5000", "0.790", "to", "0.830", "0.4300", "-"]
    first = lines.index(["stsb-en-test,", "Spearman"])
    assert lines[first + 1] == [*dense, "96.7%", "87.8%", "0.040"]
    assert lines[first + 2] == ["scifact,", "nDCG@10"]
    assert lines[first + 3] == [*sparse, "96.7%", "-", "0.040"]
    text = show(result)
    assert "scifact: 1,234 of 5,678 texts are longer than the limit of tokens and were cut." in text
    assert "stsb-en-test: " not in text and "\x1b" not in text
    lines = read_lines(text)
    first = lines.index(["parameters", "original", "model", "kept"])
    rows = [line for line in lines[first + 1 :] if line][:5]
    assert rows == [
        ["encoder", "8,000,000", "2,000,000", "25.0%"],
        ["embeddings", "6,000", "3,000", "50.0%"],
        ["pooler", "40", "10", "25.0%"],
        ["heads", "0", "5"],
        ["total", "8,006,040", "2,003,015", "25.0%"],
    ]
    text = show(result, width=30)
    rate = "texts per second: 200, original 100 (2.01 times)"
    assert text.endswith(f"\none text: 5.0 ms, original 10.0 ms; {rate}\n")
    for number in ("0.8124", "0.790 to 0.830", "0.6120", "96.7%", "87.8%", "0.040"):
        assert number in text
    assert "…" not in text.split("parameters")[0]
    result["speed"]["load"] = "others worked"
    assert show(result).endswith("times)\nwhile this was measured, others worked\n")
    result["parameters"]["baseline"] = None
    result["speed"] = None
    for task in result["tasks"]:
        task.update(baseline=None, retention=None, retention_above_floor=None)
        del task["also"], task["p_value"]
    text = show(result)
    assert "kept" not in text and "original" not in text and "one text" not in text
    dense = ["dense", "0.8124", "0.790", "to", "0.830", "0.4300", "0.6120"]
    assert dense in read_lines(text)


@pytest.mark.parametrize("name", ["stsb[en]", "a[/b]"])
def test_names_with_brackets_are_printed_as_they_are(name, result):
    for task in result["tasks"]:
        task["also"] = {name: 0.25}
        task["task"] = name
    text = show(result)
    assert [f"{name},", "Spearman"] in read_lines(text)
    assert text.count(name) == 3  # as a column, as a task, and in the note
