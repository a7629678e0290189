"""JSON is what its schema says, or the message names file, key and kind."""

import json

import pytest

from bge_pruning.utils.records import (
    COUNT,
    DEPTH,
    FLAG,
    NUMBER,
    POSITIVE,
    SIZE,
    TEXT,
    Each,
    Either,
    OneOf,
    Optional,
    check_record,
    parse_json,
    read_record,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("schema", "good", "wrong"),
    [
        (NUMBER, (0, -1.5, 1e15), (NAN, float("inf"), 1e16, 10**400, "1", True, None)),
        (COUNT, (0, 7), (-1, 1.0, 10**16, False)),
        (POSITIVE, (1, 0.1), (0, -1, NAN)),
        (SIZE, (1, 10_000_000), (0, 10_000_001, 1.0)),
        (DEPTH, (1, 1000), (0, 1001)),
        (TEXT, ("", "ü"), ("\ud800", 1, None)),
        (FLAG, (True, False), (0, "true")),
        (OneOf("a", "b"), ("a",), ("c", 1, ["a"])),
        (Optional(COUNT), (None, 1), ("x",)),
        (Either({"a": TEXT}, TEXT), ("x", {"a": "x"}), (1, {"a": 1})),
        ([COUNT], ([], [1, 2]), ([1, "x"], {}, 1)),
        ((COUNT, TEXT), ([1, "x"],), ([1], [1, "x", 2], ["x", 1])),
        (Each(COUNT), ({}, {"x": 1}), ({"x": -1}, [])),
        ({"a": COUNT, "b?": TEXT}, ({"a": 1}, {"a": 1, "b": "", "c": 2}), ({}, {"a": 1, "b": 2})),
    ],
)
def test_kinds(schema, good, wrong):
    for value in good:
        check_record(value, schema, "f", "x")
    for value in wrong:
        with pytest.raises(ValueError, match=r"^f: .*\. To fix, x\.$"):
            check_record(value, schema, "f", "x")


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
        check_record(value, {"a": [{"b": NUMBER}]}, "f", "write it again")


def test_files(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"a\.json: no such file\. To fix, copy it\."):
        read_record(path, {}, "copy it")
    path.write_text(json.dumps({"a": 1}))
    assert read_record(path, {"a": COUNT}, "copy it") == {"a": 1}
    assert parse_json(b'"\\ud83d\\ude00 \\u00fc"', "f", "x") == "😀 ü"


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
        parse_json(content, "f", "copy it")
