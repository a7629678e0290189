"""Retrieval scores in tables, of a terminal and of a report."""

from rich.console import Console

from bge_pruning.utils.console import show_evaluation
from bge_pruning.utils.retrieval_table import HEADER, render_retrieval, retrieval_rows
from bge_pruning.utils.tasks import retrieval_tasks, similarity_tasks


def entries(mode: str, value: float, baseline: float | None) -> list[dict]:
    common = {
        "task": "scifact",
        "mode": mode,
        "baseline": baseline,
        "floor": 0.125,
        "floors": {"random_weights": 0.125},
        "retention": None if baseline is None else value / baseline,
        "retention_above_floor": None if baseline is None else 0.75,
        "queries": 10,
        "seconds": 1.0,
    }
    others = {"mrr_at_10": 0.25, "recall_at_100": 0.5, "map_at_100": 0.375}
    first = {**common, "metric": "ndcg_at_10", "value": value, "interval": [0.1, 0.9]}
    if baseline is not None:
        first["p_value"] = 0.04
    return [first, *({**common, "metric": m, "value": v} for m, v in others.items())]


SIMILARITY = {
    "task": "sts",
    "metric": "cosine_spearman",
    "value": 0.8,
    "baseline": None,
    "floors": {},
    "retention": None,
    "retention_above_floor": None,
}
RESULT = {
    "tasks": [SIMILARITY, *entries("dense", 0.5, 0.625), *entries("all", 0.75, None)],
    "parameters": {"model": {"encoder": 5}, "baseline": None},
    "speed": None,
}


def test_entries_are_told_apart():
    assert similarity_tasks(RESULT) == [SIMILARITY]
    assert len(retrieval_tasks(RESULT)) == 8


def test_a_row_for_each_mode():
    numbers = ["0.2500", "0.5000", "0.3750"]
    assert retrieval_rows(RESULT) == [
        ["scifact", "dense", "0.5000", "0.100 to 0.900", "0.6250", "0.1250", "80.0%", "75.0%",
         "0.040", *numbers],
        ["scifact", "all", "0.7500", "0.100 to 0.900", "-", "0.1250", "-", "-", "-", *numbers],
    ]  # fmt: skip


def test_a_markdown_table():
    heading, text, table = render_retrieval(RESULT)
    assert heading == "## Retrieval"
    assert "mteb" in text
    lines = table.splitlines()
    assert lines[0] == "| " + " | ".join(HEADER) + " |"
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert render_retrieval({"tasks": [SIMILARITY]}) == []


def test_a_table_that_fits_a_terminal():
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as capture:
        show_evaluation(RESULT, console)
    text = capture.get()
    assert "cosine Spearman (dense)" in text
    row = next(line for line in text.splitlines() if "scifact" in line and "dense" in line)
    for cell in ("0.5000", "0.6250", "0.1250", "80.0%", "75.0%", "0.040"):
        assert cell in row
