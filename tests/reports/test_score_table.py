"""Scores in Markdown tables."""

import pytest

from bge_pruning.reports.tables import render_scores, score_header, score_rows, truncation_notes
from bge_pruning.utils.tasks import METRIC_TITLES, main_scores


@pytest.fixture
def result(make_entry) -> dict:
    alone = {"baseline": None, "retention": None, "retention_above_floor": None, "also": {}}
    retrieval = {"kind": "retrieval", "truncated": 3, "texts": 1000}
    tasks = [
        make_entry("stsb-en", value=0.8, also={"first": 0.7}),
        make_entry("stsb-en", value=0.81, main=False, metric="cosine_pearson"),
        make_entry(
            *("scifact", "all"), value=0.5, metric="ndcg_at_10", floors={"random_weights": 0.1},
            **alone, **retrieval,
        ),
        make_entry(
            "scifact", "all", value=0.9, main=False, metric="recall_at_100", **retrieval
        ),
    ]  # fmt: skip
    for task in tasks[1:]:
        del task["also"]
    del tasks[2]["p_value"]
    return {"tasks": tasks}


def test_the_entries_that_decide(result):
    assert [(e["task"], e["value"]) for e in main_scores(result)] == [
        ("stsb-en", 0.8),
        ("scifact", 0.5),
    ]


def test_a_row_for_each_task_and_mode(result):
    header = score_header(result)
    rows = [dict(zip(header, row, strict=True)) for row in score_rows(result)]
    assert rows[0] == {
        "task": "stsb-en",
        "mode": "dense",
        "metric": "Spearman",
        "original": "0.8200",
        "first": "0.7000",
        "model": "0.8000",
        "95 % interval": "0.790 to 0.830",
        "random weights": "0.4300",
        "word embeddings": "0.5100",
        "kept": "98.8%",
        "kept above floor": "96.8%",
        "p": "0.020",
    }
    empty = ("original", "first", "word embeddings", "kept", "kept above floor", "p")
    assert {rows[1][name] for name in empty} == {"-"}
    assert (rows[1]["metric"], rows[1]["model"]) == ("nDCG@10", "0.5000")


def test_markdown(result):
    heading, text, table, note, others = render_scores(result)
    assert heading == "## Quality"
    assert "mteb" in text and "(model - floor) / (original - floor)" in text
    lines = table.splitlines()
    assert lines[0] == "| " + " | ".join(score_header(result)) + " |"
    assert lines[1].startswith("| --- | --- | --- | ---: |")
    assert len(lines) == 4
    assert note == "scifact: 3 of 1,000 texts are longer than the limit of tokens and were cut."
    assert "| stsb-en | dense | Pearson | 0.8200 | 0.8100 | 0.5100 | 98.8% |" in others
    assert "| scifact | all | Recall@100 |" in others
    for part in (table, others):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert render_scores({"tasks": []}) == []


def test_names_are_escaped(result):
    named = {"tasks": [{**result["tasks"][2], "task": "a|b <i>"}]}
    _, _, table, note = render_scores(named)
    assert table.splitlines()[2].startswith(r"| a\|b \<i\> | all |")
    assert note.startswith(r"a\|b \<i\>: 3 of")
    assert truncation_notes(named)[0].startswith("a|b <i>: 3 of")


def test_texts_that_were_cut_are_named_once(result):
    assert len(truncation_notes(result)) == 1


def test_every_metric_has_a_title():
    from bge_pruning.evaluation.scoring import metric_names
    from bge_pruning.evaluation.search import MODES

    for kind in ("similarity", "retrieval"):
        for mode in MODES:
            assert set(metric_names(kind, mode)) <= set(METRIC_TITLES)
