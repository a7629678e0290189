"""JSON becomes the record that it is read as, or the message names file, key and kind."""

import json
from typing import Annotated

import pytest

from bge_pruning.utils import json_records
from bge_pruning.utils.records import EvaluationRecord, PruningRecord

NAN = float("nan")


class Inner(json_records.Record):
    b: json_records.Number


class Outer(json_records.Record):
    a: list[Inner]


class Pair(json_records.Record):
    a: json_records.Count
    b: json_records.Text = ""


@pytest.mark.parametrize(
    ("kind", "good", "wrong"),
    [
        (json_records.Number, (0, -1.5, 1e15), (NAN, float("inf"), 1e16, 10**400, "1", True, None)),
        (json_records.Count, (0, 7), (-1, 1.0, 10**16, False)),
        (json_records.Positive, (1, 0.1), (0, -1, NAN)),
        (json_records.Size, (1, 10_000_000), (0, 10_000_001, 1.0)),
        (json_records.Depth, (1, 1000), (0, 1001)),
        (json_records.Text, ("", "ü"), ("\ud800", 1, None)),
        (json_records.Flag, (True, False), (0, "true")),
        (json_records.Interval, ([0.1, 2],), ([1], [1, 2, 3], [1, NAN], "ab", None)),
        (Annotated[str, json_records.one_of(("a", "b"))], ("a",), ("c", 1, ["a"])),
        (json_records.Count | None, (None, 1), ("x",)),
        (list[json_records.Count], ([], [1, 2]), ([1, "x"], {}, 1)),
        (dict[str, json_records.Count], ({}, {"x": 1}), ({"x": -1}, [])),
        (Pair, ({"a": 1}, {"a": 1, "b": "", "c": 2}), ({}, {"a": 1, "b": 2}, [])),
    ],
)
def test_kinds(kind, good, wrong):
    for value in good:
        json_records.parse_record(value, kind, "f", "x")
    for value in wrong:
        with pytest.raises(ValueError, match=r"^f: .*\. To fix, x\.$"):
            json_records.parse_record(value, kind, "f", "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [{"b": 1}, {"b": "x"}]}, r'f: a\[1\]\.b is "x", expected a finite number\. To fix'),
        ({"a": [{"b": 10**30}]}, r"f: a\[0\]\.b is a huge number, expected"),
        ({"a": [{"b": []}]}, r"f: a\[0\]\.b is a list, expected"),
        ({"a": [{"b": "y" * 99}]}, r'b is "y{36}\.\.\., expected'),
        ({"a": [{}]}, r"f: has no a\[0\]\.b\. To fix, write it again\."),
        ({"a": 3}, r"f: a is 3, expected a list\. To fix"),
        ([], r"f: it is a list, expected an object with keys"),
    ],
)
def test_messages(value, message):
    with pytest.raises(ValueError, match=message):
        json_records.parse_record(value, Outer, "f", "write it again")


def test_a_record_is_written_as_it_was_read_and_missing_keys_are_named_together():
    """Unknown keys stay, and what was not given is not invented."""
    content = {"a": [{"b": 1, "later": {"x": [None]}}], "more": "ü"}
    assert json_records.parse_record(content, Outer, "f", "x").as_dict() == content
    assert json_records.parse_record({"a": 1}, Pair, "f", "x").as_dict() == {"a": 1}
    pair = Pair(a=1)
    pair.b = "set"
    assert pair.as_dict() == {"a": 1, "b": "set"}
    with pytest.raises(ValueError, match=r"^f: has no source, source_shape, shape, parameters, "):
        json_records.parse_record({}, PruningRecord, "f", "x")
    entry = {"task": "a", "mode": "dense", "value": 1, "floor": 0}
    entry |= {"baseline": None, "retention": None}
    tasks = [{**entry, "main": True}, {**entry, "main": False, "value": 2}]
    record = json_records.parse_record({"tasks": tasks}, EvaluationRecord, "f", "x")
    assert [score.value for score in record.main_scores()] == [1]


def test_files(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"a\.json: no such file\. To fix, copy it\."):
        json_records.read_record(path, Pair, "copy it")
    path.write_text(json.dumps({"a": 1}))
    assert json_records.read_record(path, Pair, "copy it").a == 1
    assert json_records.parse_json(b'"\\ud83d\\ude00 \\u00fc"', "f", "x") == "😀 ü"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "Exceeds the limit"),
        (b'{"a": "\\ud800"}', "it spells half of a surrogate pair"),
    ],
    ids=["cut", "bytes", "deep", "digits", "half"],
)
def test_texts_that_are_no_json(content, reason):
    with pytest.raises(ValueError, match=rf"^f: is not JSON \({reason}.*\)\. To fix, copy it"):
        json_records.parse_json(content, "f", "copy it")
