"""Scores in Markdown tables."""

from bge_pruning.utils.score_table import (
    render_scores,
    score_header,
    score_rows,
    truncation_notes,
)
from bge_pruning.utils.tasks import METRIC_TITLES, main_scores


def entry(task: str, mode: str, value: float, **changes) -> dict:
    """The main entry of a task in a mode."""
    kind = "similarity" if task.startswith("stsb") else "retrieval"
    found = {
        "task": task,
        "kind": kind,
        "mode": mode,
        "metric": "cosine_spearman" if kind == "similarity" else "ndcg_at_10",
        "main": True,
        "value": value,
        "baseline": 0.84,
        "floor": 0.612,
        "floors": {"random_weights": 0.43, "word_embeddings": 0.612},
        "retention": 0.9671,
        "retention_above_floor": 0.8784,
        "interval": [0.79, 0.83],
        "p_value": 0.04,
        "samples": 10,
        "texts": 1000,
        "truncated": 0,
        "seconds": 1.0,
    }
    return {**found, **changes}


RESULT = {
    "tasks": [
        entry("stsb-en", "dense", 0.8, also={"first": 0.7}),
        entry("stsb-en", "dense", 0.81, main=False, metric="cosine_pearson"),
        entry("scifact", "all", 0.5, baseline=None, retention=None, retention_above_floor=None,
              floors={"random_weights": 0.1}, truncated=3),
        entry("scifact", "all", 0.9, main=False, metric="recall_at_100", truncated=3),
    ]
}  # fmt: skip
del RESULT["tasks"][2]["p_value"]


def test_the_entries_that_decide():
    assert [(e["task"], e["value"]) for e in main_scores(RESULT)] == [
        ("stsb-en", 0.8),
        ("scifact", 0.5),
    ]


def test_a_row_for_each_task_and_mode():
    header = score_header(RESULT)
    rows = [dict(zip(header, row, strict=True)) for row in score_rows(RESULT)]
    assert rows[0] == {
        "task": "stsb-en",
        "mode": "dense",
        "metric": "Spearman",
        "original": "0.8400",
        "first": "0.7000",
        "model": "0.8000",
        "95 % interval": "0.790 to 0.830",
        "random weights": "0.4300",
        "word embeddings": "0.6120",
        "kept": "96.7%",
        "kept above floor": "87.8%",
        "p": "0.040",
    }
    empty = ("original", "first", "word embeddings", "kept", "kept above floor", "p")
    assert {rows[1][name] for name in empty} == {"-"}
    assert (rows[1]["metric"], rows[1]["model"]) == ("nDCG@10", "0.5000")


def test_markdown():
    heading, text, table, note, others = render_scores(RESULT)
    assert heading == "## Quality"
    assert "mteb" in text and "(model - floor) / (original - floor)" in text
    lines = table.splitlines()
    assert lines[0] == "| " + " | ".join(score_header(RESULT)) + " |"
    assert lines[1].startswith("| --- | --- | --- | ---: |")
    assert len(lines) == 4
    assert note == "scifact: 3 of 1,000 texts are longer than the model reads and were cut."
    assert "| stsb-en | dense | Pearson | 0.8400 | 0.8100 | 0.6120 | 96.7% |" in others
    assert "| scifact | all | Recall@100 |" in others
    for part in (table, others):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert render_scores({"tasks": []}) == []


def test_names_are_escaped():
    result = {"tasks": [{**RESULT["tasks"][2], "task": "a|b <i>"}]}
    _, _, table, note = render_scores(result)
    assert table.splitlines()[2].startswith(r"| a\|b \<i\> | all |")
    assert note.startswith(r"a\|b \<i\>: 3 of")
    assert truncation_notes(result)[0].startswith("a|b <i>: 3 of")


def test_texts_that_were_cut_are_named_once():
    assert len(truncation_notes(RESULT)) == 1


def test_every_metric_has_a_title():
    from bge_pruning.evaluation.scoring import metric_names
    from bge_pruning.evaluation.search import MODES

    for kind in ("similarity", "retrieval"):
        for mode in MODES:
            assert set(metric_names(kind, mode)) <= set(METRIC_TITLES)
