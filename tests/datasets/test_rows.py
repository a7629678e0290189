"""Rows as arrays, and rows that are wrong."""

import logging

import numpy as np
import pytest

from bge_pruning.datasets.rows import NAMED, BadRows, RowTable

# Three rows: a query with two positives and a negative, a text alone, a pair with a score.
TABLE = RowTable(
    texts=np.array([4, 1, 2, 0, 3, 5, 4]),
    starts=np.array([0, 4, 5, 7]),
    positives=np.array([2, 0, 0]),
    scores=np.array([np.nan, 7, 8, 9, np.nan, np.nan, 2.5], np.float32),
)


def test_parts_of_rows():
    assert len(TABLE) == 3
    assert TABLE.first.tolist() == [4, 3, 5]
    assert TABLE.negatives_of(0).tolist() == [0]
    assert TABLE.negatives_of(1).tolist() == []
    assert TABLE.roles.tolist() == [0, 1, 1, 2, 0, 0, 2]


def test_rows_are_selected():
    found = TABLE.select(np.array([True, False, True]))
    assert found.texts.tolist() == [4, 1, 2, 0, 5, 4]
    assert found.starts.tolist() == [0, 4, 6]
    assert found.positives.tolist() == [2, 0]
    assert found.scores[4:].tolist() == [pytest.approx(np.nan, nan_ok=True), 2.5]
    assert len(TABLE.select(np.zeros(3, bool))) == 0


def test_a_wrong_row_stops():
    bad = BadRows()
    with pytest.raises(ValueError, match="x:1: wrong"), bad.guard():
        raise ValueError("x:1: wrong")
    assert bad.count == 0
    with pytest.raises(FileNotFoundError), BadRows(skip=True).guard():  # whatever the policy
        raise FileNotFoundError("gone")


def test_wrong_rows_are_counted_and_the_first_are_named(caplog):
    bad = BadRows(skip=True)
    bad.report("none")
    assert not caplog.records
    for line in range(8):
        with bad.guard():
            raise ValueError(f"x:{line}: wrong")
    with caplog.at_level(logging.WARNING):
        bad.report("mine")
    assert bad.count == 8
    assert len(bad.examples) == NAMED
    assert all(t in caplog.text for t in ("mine: 8 rows skipped", "x:4: wrong", "and 3 more"))
    assert "x:5" not in caplog.text
