"""Means over the tasks of a kind, against numbers worked out by hand."""

import numpy as np
import pytest

from bge_pruning.evaluation.task_means import describe_means
from bge_pruning.utils.records import Entry

RANGE = np.linspace(0.0, 1.0, 1001)


@pytest.fixture
def scored(make_entry):
    """Two collections in two modes, and pairs."""

    def build(task: str, mode: str = "dense", kind: str = "retrieval", **changes: object) -> Entry:
        floors = {"random_weights": 0.1, "word_embeddings": 0.3}
        given = {"value": 0.6, "baseline": 0.8, "floor": 0.3, "floors": floors, "samples": 5}
        return Entry(**make_entry(task, mode, kind=kind, **{**given, **changes}))

    return [
        build("a", also={"before": 0.5}),
        build("a", "sparse", also={"before": None}),
        build("pairs", kind="similarity"),
        build("b", value=0.9, baseline=1.0, also={"before": 0.7}),
        build("b", "sparse", baseline=None, also={"before": 0.5}),
    ]


def test_means_are_of_the_tasks_of_a_kind(scored):
    drawn = {(e.task, e.mode): RANGE for e in scored}
    dense, sparse = (entry.as_dict() for entry in describe_means(scored, drawn))
    assert {k: dense[k] for k in ("task", "kind", "mode", "samples", "also")} == {
        "task": "mean of 2 retrieval tasks",
        "kind": "retrieval",
        "mode": "dense",
        "samples": 10,
        "also": {"before": 0.6},
    }
    assert [dense[k] for k in ("value", "baseline", "floor")] == pytest.approx([0.75, 0.9, 0.3])
    assert dense["floors"] == pytest.approx({"random_weights": 0.1, "word_embeddings": 0.3})
    # Of the mean score, not the mean of what each task keeps: (0.75 + 0.9) / 2.
    assert dense["retention"] == pytest.approx(0.75 / 0.9)
    assert dense["retention_above_floor"] == pytest.approx(0.45 / 0.6)
    assert dense["interval"] == pytest.approx([0.025, 0.975])
    assert sparse["also"] == {"before": None}  # one of the tasks lacks it
    assert sparse["baseline"] is sparse["retention"] is sparse["retention_above_floor"] is None


def test_what_varies_together_does_not_cancel(scored):
    """As translations of the same texts do; in opposite directions nothing is left."""
    opposite = {(e.task, e.mode): 1.0 - RANGE if e.task == "b" else RANGE for e in scored}
    assert describe_means(scored, opposite)[0].interval == pytest.approx([0.5, 0.5])
    assert describe_means(scored[:3], opposite) == []
