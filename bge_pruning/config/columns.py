"""Which columns of a table a configuration means: one, several by a pattern, or a part of one.

``text`` is a column, ``negative_*`` all that fit, in the order of their numbers.
``passages[].text`` is the text of each passage, ``ids[:1]`` and ``ids[1:]`` slice a list, and
``answer.text`` is a part of an object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

STEP = re.compile(r"\[(?:(-?\d*):(-?\d*))?\]|\.([^.\[\]]+)")
SPEC = re.compile(rf"([^.\[\]]+)((?:{STEP.pattern})*)")
# Names of columns that an error lists.
SHOWN = 20


@dataclass(frozen=True)
class Column:
    """Columns of a table that are read as one.

    Attributes:
        names: Their names there.
        several: Whether they are the columns of a pattern, whose values form a list.
        steps: What is taken of the value, each as it is written.
    """

    names: tuple[str, ...]
    several: bool = False
    steps: tuple[str, ...] = ()

    def read(self, row: Mapping[str, Any], where: str) -> Any:
        """Its value in a row. Of a pattern, columns that are empty in this row are left out.

        Raises:
            ValueError: If a part is not there.
        """
        value = row[self.names[0]]
        if self.several:
            parts = [row[name] for name in self.names]
            lists = [part if isinstance(part, list) else [part] for part in parts]
            value = [item for part in lists for item in part if item not in (None, "")]
        try:
            return _walk(value, self.steps)
        except (LookupError, TypeError, ValueError) as error:
            path = f"{self.names[0]}{''.join(self.steps)}"
            raise ValueError(
                f"{where}: {path} cannot be read ({error}). To fix, correct columns of the source, "
                f"or the row."
            ) from None


def find_column(spec: str, there: Sequence[str]) -> Column | None:
    """The columns of a table that a configuration names, ``None`` if they are not there."""
    if spec in there:
        return Column((spec,))
    found = SPEC.fullmatch(spec)
    head, steps = (found[1], found[2]) if found else (spec, "")
    parts = tuple(match[0] for match in STEP.finditer(steps))
    if "*" in head:
        names = sorted((n for n in there if fnmatchcase(n, head)), key=_by_number)
        return Column(tuple(names), True, parts) if names else None
    return Column((head,), False, parts) if head in there else None


def describe_missing(specs: Sequence[str], there: Sequence[str]) -> str:
    """Which columns are missing, with the nearest names, and those that are there."""
    near = [n for spec in specs for n in get_close_matches(re.split(r"[.\[]", spec)[0], there, n=2)]
    hint = f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    return f"{', '.join(specs)}{hint}, but {', '.join(there[:SHOWN])}{more}"


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts ``negative_2`` before ``negative_10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _walk(value: Any, steps: Sequence[str]) -> Any:
    if not steps or value is None:
        return value
    if key := STEP.fullmatch(steps[0])[3]:
        if key not in value:
            raise LookupError(f"there is no '{key}', but {', '.join(map(str, value))[:200]}")
        return _walk(value[key], steps[1:])
    if isinstance(value, str):  # of ids and scores, as CSV and some data sets write them
        value = json.loads(value)
    if isinstance(value, Mapping):  # a list of objects, as older data sets hold it
        parts = zip(*value.values(), strict=True)
        value = [dict(zip(value, part, strict=True)) for part in parts]
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} is no list")
    if steps[0] == "[]":
        return [_walk(item, steps[1:]) for item in value]
    bounds = STEP.fullmatch(steps[0]).groups()[:2]
    return _walk(value[slice(*(int(n) if n else None for n in bounds))], steps[1:])
