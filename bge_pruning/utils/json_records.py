"""JSON files as typed records: the kind of every value is checked when a file is read.

People and other programs may have changed a file. A value of another kind would end as a
``TypeError`` far away from it; here it is an error that names the file and the key. A record keeps
keys that it does not know, and is written with the keys that it was given (:meth:`Record.as_dict`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

# Larger ones are no measurement, and a float does not hold every whole number beyond.
LARGEST = 1e15


def kind_of(expected: str, is_kind: Callable[[Any], bool]) -> PlainValidator:
    """Accept the values that a function accepts, as they are."""

    def check(value: Any) -> Any:
        if not is_kind(value):
            raise PydanticCustomError("kind", "{expected}", {"expected": expected})
        return value

    return PlainValidator(check)


def one_of(texts: Sequence[str]) -> PlainValidator:
    """Accept a text that is one of some."""
    return kind_of(f"one of {', '.join(texts)}", lambda v: isinstance(v, str) and v in texts)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST  # NaN is not


def _is_whole(value: Any, least: int, most: float = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_text(value: Any) -> bool:
    """Whether it can be written: JSON can spell half of a character."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


Number = Annotated[float, kind_of("a finite number", _is_number)]
Positive = Annotated[float, kind_of("a number above 0", lambda v: _is_number(v) and v > 0)]
Count = Annotated[int, kind_of("a whole number of 0 or more", lambda v: _is_whole(v, 0))]
Size = Annotated[
    int, kind_of("a whole number from 1 to 10 million", lambda v: _is_whole(v, 1, 10_000_000))
]
Depth = Annotated[int, kind_of("a whole number from 1 to 1000", lambda v: _is_whole(v, 1, 1000))]
Text = Annotated[str, kind_of("a text", _is_text)]
Flag = Annotated[bool, kind_of("true or false", lambda v: isinstance(v, bool))]
Interval = Annotated[list[float], kind_of("a list of 2 finite numbers", _is_interval)]


class Record(BaseModel):
    """A JSON object with known keys; others are kept."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the keys that were given."""
        return self.model_dump(exclude_unset=True)


R = TypeVar("R")


def read_record(path: Path, kind: type[R], fix: str) -> R:
    """A JSON file as a record, or a ``ValueError`` that names the file, the key and the fix.

    ``kind`` is a subclass of :class:`Record`, or another type such as ``dict[str, Text]``, and
    ``fix`` what to do about a wrong file, such as ``extract the model again``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. To fix, {fix}.")
    return parse_record(parse_json(path.read_bytes(), str(path), fix), kind, str(path), fix)


def parse_record(content: Any, kind: type[R], where: str, fix: str) -> R:
    """A parsed JSON value as a record; ``where`` is its file, see :func:`read_record`."""
    try:
        return TypeAdapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_describe(error)}. To fix, {fix}.") from None


def parse_json(content: bytes, where: str, fix: str) -> Any:
    """The value of a JSON text in UTF-8; ``where`` is its file, see :func:`read_record`."""
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


def _describe(error: ValidationError) -> str:
    """The first thing that is wrong, and all keys that are missing beside it."""
    errors = error.errors(include_url=False)
    first = errors[0]
    if first["type"] == "missing":
        inside = first["loc"][:-1]
        missing = [e for e in errors if e["type"] == "missing" and e["loc"][:-1] == inside]
        return f"has no {', '.join(_key(e['loc']) for e in missing)}"
    kind = first["type"]
    expected = {"list_type": "a list", "kind": first["msg"]}.get(kind, "an object with keys")
    return f"{_key(first['loc']) or 'it'} is {show(first['input'])}, expected {expected}"


def _key(place: Sequence[str | int]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".")


def show(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if type(value) is int and abs(value) > LARGEST:
        return "a huge number"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
