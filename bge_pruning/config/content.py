"""Checks of what a YAML file or an override holds: known keys, and values of their types.

Their messages name the file, the line and the key, and what was expected there.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from bge_pruning.config.names import DATA_FOLDER, data_path
from bge_pruning.config.schema import Config, ConfigError

# What a value must be, by type, with an example.
KINDS = {
    int: ("a whole number", "17"),
    float: ("a number", "0.5"),
    bool: ("true or false", "true"),
    str: ("a text", '"name"'),
    list: ("a list", "[a, b]"),
    dict: ("keys with values", "{a: b}"),
}
SWITCHES = "true false yes no on off y n 1 0".split()


@dataclass(frozen=True)
class Origin:
    """Where keys and values come from: a file, an override or the recovery."""

    name: str
    path: Path | None = None

    def at_text(self, text: str) -> str:
        """The name, with the line of the first value that holds a text."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path else []
        line = next((n for n, content in enumerate(lines, start=1) if text in content), None)
        return f"{self.name}:{line}" if line else self.name

    def at(self, key: tuple[str, ...]) -> str:
        """The name, with the line of a key if it is known."""
        line = _line_of(self.path, key) if self.path else None
        return f"{self.name}:{line}" if line else self.name


def check_content(
    content: Any, hint: Any, keys: tuple[str, ...], origin: Origin, item: bool = False
) -> None:
    """Refuse keys that the schema lacks, values of other types, and what OmegaConf would compute.

    References to other keys are allowed, and so is the folder of the data. With any other
    ``${oc.env:NAME}``, a secret of the environment would be written into ``config.yaml``. Where the
    type is ``Any``, keys are free.

    Args:
        hint: Type of the key: that of a value, ``list[X]``, ``dict[str, X]`` or a dataclass.
        item: Whether it is one of the items that the keys lead to.
    """
    if isinstance(content, str) and DATA_FOLDER in content:
        where = f"{origin.at_text(DATA_FOLDER)}: {'.'.join(keys)}: "
        try:
            data_path(content.replace("\\", ""), where)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        content = content.replace(DATA_FOLDER, "")
    if isinstance(content, str) and (found := re.search(r"\$\{[^}]*:", content)):
        raise ConfigError(
            f"{origin.name}: {'.'.join(keys)}: {found[0]}...}} cannot be read from a "
            f"configuration. To fix, write the value itself."
        )
    kind, inner = _check_type(content, hint, keys, origin, item)
    for part in content if isinstance(content, list) else ():
        check_content(part, inner, keys, origin, item=True)
    hints = get_type_hints(kind) if is_dataclass(kind) else None
    for key, value in content.items() if isinstance(content, dict) else ():
        below = (*keys, str(key))
        if hints is not None and key not in hints:
            fix = _suggest_key(str(key), list(hints), keys[:1] == ("recovery",))
            raise ConfigError(f"{origin.at(below)}: unknown key '{'.'.join(below)}': {fix}")
        # The keys of a recovery are those of the whole configuration.
        of_recovery = below == ("recovery",) and isinstance(value, dict)
        hint = inner if hints is None else Config if of_recovery else hints[key]
        check_content(value, hint, below, origin)


def _check_type(
    content: Any, hint: Any, keys: tuple[str, ...], origin: Origin, item: bool
) -> tuple[Any, Any]:
    """Refuse a value of another type; return the type without ``Optional``, and that of items."""
    arguments = get_args(hint)
    if type(None) in arguments:
        if content is None:
            return hint, Any
        hint = arguments[0]
        arguments = get_args(hint)
    inner = arguments[-1] if arguments else Any
    kind = dict if is_dataclass(hint) else get_origin(hint) or hint
    is_reference = isinstance(content, str) and "${" in content
    if kind not in KINDS or is_reference or _is_of(kind, content):
        return hint, inner
    name = f"{'an item of ' if item else ''}{'.'.join(keys)}"
    words, example = KINDS[kind]
    for part, form in ((hint, "{}"), (inner, "[{}]")):
        if is_dataclass(part):
            example = form.format(f"{{{fields(part)[0].name}: ...}}")
    shown = " and is empty" if content is None else f", not {repr(content)[:60]}"
    raise ConfigError(
        f"{origin.at(keys)}: {name} must be {words}{shown}. To fix, write e.g. {example}."
    )


def _is_of(kind: type, content: Any) -> bool:
    """Whether OmegaConf takes it for this type: it also reads numbers and switches from texts."""
    if kind in (list, dict):
        return isinstance(content, kind)
    if content is None or isinstance(content, list | dict):
        return False
    if kind is bool:
        return str(content).lower() in SWITCHES
    if kind is str:
        return True
    try:
        kind(content)
    except (ValueError, OverflowError):
        return False
    return not isinstance(content, bool) and not (kind is int and isinstance(content, float))


def _suggest_key(key: str, known: list[str], in_recovery: bool) -> str:
    """Where a key may belong: it is misspelt, or a part of it is missing."""
    prefix = "recovery." if in_recovery else ""
    places = [f"{prefix}{path}" for path in _key_paths(Config) if path.split(".")[-1] == key]
    close = places[:3] or difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known: {', '.join(sorted(known))}."


def _key_paths(schema: type) -> list[str]:
    """The keys of a dataclass, then those of the ones inside it and of items of lists."""
    hints = get_type_hints(schema)
    inside = {k: t for k, hint in hints.items() for t in (hint, *get_args(hint)) if is_dataclass(t)}
    paths = [f"{key}.{path}" for key, part in inside.items() for path in _key_paths(part)]
    return [*hints, *sorted(paths, key=lambda path: path.count("."))]


def _line_of(path: Path, key: tuple[str, ...]) -> int | None:
    """Line of a (nested) key in a YAML file, from 1."""
    node = yaml.compose(path.read_text(encoding="utf-8"))
    line = None
    for part in key:
        if isinstance(node, yaml.SequenceNode):
            node = next((n for n in node.value if part in [k.value for k, _ in n.value]), None)
        if not isinstance(node, yaml.MappingNode):
            return line
        pair = next(((k, v) for k, v in node.value if k.value == part), None)
        if pair is None:
            return line
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
