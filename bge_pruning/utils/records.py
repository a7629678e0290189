"""JSON files that people and other programs may have changed: the kind of every value is checked.

What a report or a model card is made of comes from files. A value of another kind would end as a
``TypeError`` far away from the file; here it is an error that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Kinds of a single value.
NUMBER = "a finite number"
COUNT = "a whole number of 0 or more"
POSITIVE = "a number above 0"
DEPTH = "a whole number from 1 to 1000"
SIZE = "a whole number from 1 to 10 million"
TEXT = "a text"
FLAG = "true or false"
ANYTHING = "anything"
# Larger ones are no measurement, and a float does not hold every whole number beyond.
LARGEST = 1e15
# One of the kinds; a list of one schema; a tuple of schemas, one for each item; keys and schemas
# (a key that ends with ? may be missing); or one of the classes below.
Schema = Any


class Optional:
    """A schema, or null."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema


class Each:
    """An object with any keys, every value of one schema."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema


class Either:
    """Of the first schema, or of the second, which the message names."""

    def __init__(self, first: Schema, second: Schema) -> None:
        self.first, self.second = first, second


class OneOf:
    """One of some texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts


def read_record(path: Path, schema: Schema, fix: str) -> dict[str, Any]:
    """A JSON object from a file, checked.

    Args:
        path: The file.
        schema: Its keys; others may be there too.
        fix: What to do about a wrong file, such as ``extract the model again``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no JSON object of this kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. To fix, {fix}.")
    record = parse_json(path.read_bytes(), str(path), fix)
    check_record(record, schema, str(path), fix)
    return record


def parse_json(content: bytes, where: str, fix: str) -> Any:
    """The value that a JSON text stands for.

    Args:
        content: The text, in UTF-8.
        where: File, for the message.
        fix: What to do about it.

    Raises:
        ValueError: If it is no JSON.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError:
        reason = "not UTF-8"
    except UnicodeEncodeError:
        reason = "it spells half of a surrogate pair"
    except ValueError as error:  # also of a number with thousands of digits
        reason = getattr(error, "msg", str(error))
    raise ValueError(f"{where}: is not JSON ({reason}). To fix, {fix}.")


def check_record(record: Any, schema: Schema, where: str, fix: str) -> None:
    """Refuse values of another kind than the schema says.

    Args:
        record: What was read.
        schema: See :data:`Schema`.
        where: File, for the message.
        fix: What to do about it.

    Raises:
        ValueError: If a key is missing or a value is of another kind; the message names it.
    """
    if found := _find_wrong(record, schema, ""):
        raise ValueError(f"{where}: {found}. To fix, {fix}.")


def _find_wrong(value: Any, schema: Schema, key: str) -> str | None:
    """What is wrong with a value, or ``None``."""
    if isinstance(schema, Optional):
        return None if value is None else _find_wrong(value, schema.schema, key)
    if isinstance(schema, Either):
        first = _find_wrong(value, schema.first, key)
        return first and _find_wrong(value, schema.second, key)
    if isinstance(schema, str | OneOf):
        return None if _is_kind(value, schema) else _say(value, schema, key)
    if isinstance(schema, Mapping | Each):
        return _wrong_in_object(value, schema, key)
    if not isinstance(value, list) or (isinstance(schema, tuple) and len(value) != len(schema)):
        length = f" of {len(schema)}" if isinstance(schema, tuple) else ""
        return f"{key or 'it'} is {show(value)}, expected a list{length}"
    items = schema if isinstance(schema, tuple) else schema * len(value)
    pairs = zip(value, items, strict=True)
    found = (_find_wrong(item, part, f"{key}[{n}]") for n, (item, part) in enumerate(pairs))
    return next((wrong for wrong in found if wrong), None)


def _wrong_in_object(value: Any, schema: Mapping[str, Schema] | Each, key: str) -> str | None:
    if not isinstance(value, dict):
        return f"{key or 'it'} is {show(value)}, expected an object with keys"
    prefix = f"{key}." if key else ""
    if isinstance(schema, Each):
        parts = dict.fromkeys(value, schema.schema)
    else:
        parts = {name.removesuffix("?"): part for name, part in schema.items()}
        missing = [n for n in schema if not n.endswith("?") and n not in value]
        if missing:
            return f"has no {', '.join(prefix + name for name in missing)}"
    found = (_find_wrong(value[n], part, prefix + n) for n, part in parts.items() if n in value)
    return next((wrong for wrong in found if wrong), None)


def _is_kind(value: Any, kind: str | OneOf) -> bool:
    if isinstance(kind, OneOf):
        return isinstance(value, str) and value in kind.texts
    number = type(value) in (int, float) and abs(value) <= LARGEST  # NaN is not
    return {
        NUMBER: number,
        COUNT: number and type(value) is int and value >= 0,
        POSITIVE: number and value > 0,
        DEPTH: number and type(value) is int and 1 <= value <= 1000,
        SIZE: number and type(value) is int and 1 <= value <= 10_000_000,
        TEXT: isinstance(value, str) and _is_unicode(value),
        FLAG: isinstance(value, bool),
        ANYTHING: True,
    }[kind]


def _is_unicode(text: str) -> bool:
    """Whether it can be written: JSON can spell half of a character."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _say(value: Any, kind: str | OneOf, key: str) -> str:
    expected = f"one of {', '.join(kind.texts)}" if isinstance(kind, OneOf) else kind
    return f"{key or 'it'} is {show(value)}, expected {expected}"


def show(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if type(value) is int and abs(value) > LARGEST:
        return "a huge number"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


PLAIN, GATES, COMPILED, TEACHER, CACHED = "plain", "gates", "compiled", "teacher", "cached"
# Every training, in this order, and what it is.
TRAININGS = {
    PLAIN: "plain fine-tuning",
    GATES: "gates",
    COMPILED: "gates, compiled",
    TEACHER: "gates, teacher on the fly",
    CACHED: "gates, cached teacher",
}
