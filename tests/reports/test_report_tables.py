"""The tables of a report: gains, gates, the constraint and scores."""

import numpy as np
import pytest

from bge_pruning.reports import report_tables as tables
from bge_pruning.utils.records import METRIC_TITLES, Constraint, EvaluationRecord


def text(parts):
    return "\n\n".join(parts)


def test_counts_come_from_the_extraction_or_else_from_the_evaluation(inputs):
    assert list(tables.count_parts(inputs)) == ["original", "pruned"]
    inputs.pruning = None
    assert list(tables.count_parts(inputs)) == ["original", "pruned"]
    inputs.evaluation.parameters.baseline = None
    assert list(tables.count_parts(inputs)) == ["pruned"]
    assert "| parameters | pruned |\n" in text(tables.render_gains(inputs))
    inputs.evaluation = None
    assert tables.count_parts(inputs) == {} and tables.render_gains(inputs) == []


def test_sizes_and_what_was_not_measured(inputs):
    sizes = (None, 0, 1234, 62_000_000, 999_000_000, 2_271_000_000)
    said = ["-", "0.00 kB", "1.23 kB", "62.0 MB", "999 MB", "2.27 GB"]
    assert [tables.render_bytes(size) for size in sizes] == said
    inputs.evaluation.speed.device, inputs.evaluation.speed.threads = "<GPU>", 1
    assert r"on \<GPU\>, 1 thread;" in text(tables.render_gains(inputs))
    inputs.evaluation.size_bytes["baseline"] = None
    assert "| weights on disk | - | 20.0 MB | - |" in text(tables.render_gains(inputs))
    inputs.evaluation.speed = None
    inputs.evaluation.size_bytes = {"model": None, "baseline": None}
    said = text(tables.render_gains(inputs))
    assert "Speed: not measured." in said
    assert "on disk" not in said and "memory" not in said
    inputs.evaluation.size_bytes = None
    assert "on disk" not in text(tables.render_gains(inputs))


def test_layers_are_listed_only_where_some_are_gone(inputs):
    for kept in ([0, 1, 2, 3], None):
        inputs.pruning.kept.layer = kept
        assert "Layers that stay" not in text(tables.render_pruned(inputs))
    inputs.pruning, inputs.kept = None, {}
    assert "| layers | 4 | 2.0 | - | 50.0% |" in text(tables.render_pruned(inputs))
    assert "shape" not in text(tables.render_pruned(inputs))


@pytest.mark.parametrize(
    ("axes", "columns"), [({"layer"}, 3), ({"head"}, 3), ({"head", "intermediate"}, 5)]
)
def test_layer_by_layer_of_some_axes(axes, columns, inputs):
    for arrays in (inputs.gates, inputs.kept):
        for axis in set(arrays) - axes:
            del arrays[axis]
    _, table = tables.render_by_layer(inputs)
    assert {line.count("|") for line in table.splitlines()} == {columns + 1}
    for gates in ({"hidden": np.array([0.2, 0.8])}, {}):  # not of layers
        inputs.gates = gates
        assert tables.render_by_layer(inputs) == []


def test_gates_far_from_the_target_are_said_loudly_and_the_worst_axis_counts(inputs):
    for expected, loud in ((0.48, True), (0.52, True), (0.4901, False)):
        inputs.pruning.constraint["layer"].expected_sparsity = expected
        said = text(tables.render_constraint(inputs))
        assert ("WARNING: the gates never reached the target" in said) == loud
    for axis, expected in (("hidden", 0.2), ("bud*get", 0.27)):
        inputs.pruning.constraint[axis] = Constraint(
            expected_sparsity=expected, target_sparsity=0.25, realised_sparsity=0.25
        )
    said = text(tables.render_constraint(inputs))
    assert "they were 5.00 points of sparsity (hidden dimensions) away" in said
    assert r"| bud\*get | 27.00% | 25.00% | 25.00% | 2.00 points |" in said


def test_before_a_cut_the_history_says_it(inputs):
    inputs.pruning.constraint = {}
    assert tables.render_constraint(inputs) == ["No axis was pruned by gates."]
    inputs.pruning = None
    said = text(tables.render_constraint(inputs))
    assert "what a cut would remove" in said and "after the cut" not in said
    assert "| attention heads | 49.00% | 50.00% | 50.00% | 1.00 points |" in said
    inputs.series["pruning/expected_sparsity/head"][1][-1] = 0.3
    assert "The cut would give the exact target" in text(tables.render_constraint(inputs))
    inputs.series = {}
    assert tables.render_constraint(inputs) == []


@pytest.fixture
def result(make_entry) -> EvaluationRecord:
    alone = {"baseline": None, "retention": None, "retention_above_floor": None, "also": {}}
    retrieval = {"kind": "retrieval", "truncated": 3, "texts": 1000}
    retrieval |= {"mode": "all"}
    main = {"value": 0.5, "metric": "ndcg_at_10", "floors": {"random_weights": 0.1}}
    other = {"value": 0.9, "metric": "recall_at_100", "main": False}
    tasks = [
        make_entry("stsb-en", value=0.8, also={"first": 0.7}),
        make_entry("stsb-en", value=0.81, main=False, metric="cosine_pearson"),
        make_entry("scifact", **main, **alone, **retrieval),
        make_entry("scifact", **other, **retrieval),
    ]
    for task in tasks[1:]:
        del task["also"]
    del tasks[2]["p_value"]
    return EvaluationRecord.model_validate({"tasks": tasks})


def test_scores_are_a_row_for_each_task_and_mode(result):
    header = tables.score_header(result)
    rows = [dict(zip(header, row, strict=True)) for row in tables.score_rows(result)]
    scores = {"original": "0.8200", "first": "0.7000", "model": "0.8000", "p": "0.020"}
    scores |= {"95 % interval": "0.790 to 0.830", "kept": "98.8%", "kept above floor": "96.8%"}
    scores |= {"random weights": "0.4300", "words alone": "0.5100"}
    assert rows[0] == {"task": "stsb-en", "mode": "dense", "metric": "Spearman", **scores}
    for value, said in ((0.0005, "< 0.001"), (0.0011, "0.001")):
        result.tasks[0].p_value = value
        assert tables.score_rows(result)[0][-1] == said
    result.tasks[0].p_value = 0.02
    empty = ("original", "first", "words alone", "kept", "kept above floor", "p")
    assert {rows[1][name] for name in empty} == {"-"}
    assert (rows[1]["metric"], rows[1]["model"]) == ("nDCG@10", "0.5000")
    heading, text, table, note, others = tables.render_scores(result)
    assert heading == "## Quality"
    assert "mteb" in text and "(model - floor) / (original - floor)" in text
    lines = table.splitlines()
    assert lines[0] == "| " + " | ".join(tables.score_header(result)) + " |"
    assert lines[1].startswith("| --- | --- | --- | ---: |")
    assert len(lines) == 4
    assert note == "scifact: 3 of 1,000 texts are longer than the limit of tokens and were cut."
    assert "| stsb-en | dense | Pearson | 0.8200 | 0.8100 | 0.5100 | 98.8% |" in others
    assert "| scifact | all | Recall@100 |" in others
    for part in (table, others):
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert tables.render_scores(EvaluationRecord(tasks=[])) == []
    result.tasks = [result.tasks[2].model_copy(update={"task": "a|b <i>"})]
    _, _, table, note = tables.render_scores(result)
    assert table.splitlines()[2].startswith(r"| a\|b \<i\> | all |")
    assert note.startswith(r"a\|b \<i\>: 3 of")
    assert tables.evaluation_notes(result)[0].startswith("a|b <i>: 3 of")
    assert not any("bfloat16" in note for note in tables.evaluation_notes(result))
    half = result.model_copy(update={"precision": "bf16"})
    assert tables.evaluation_notes(half)[-1].endswith("were in bfloat16.")


def test_every_metric_has_a_title():
    from bge_pruning.evaluation.scoring import metric_names
    from bge_pruning.evaluation.search import MODES

    for kind in ("similarity", "retrieval"):
        for mode in MODES:
            assert set(metric_names(kind, mode)) <= set(METRIC_TITLES)
