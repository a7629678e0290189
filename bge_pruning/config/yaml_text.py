"""YAML from a file that nobody vouches for: checked before a parser builds objects of it.

The C parser overflows the stack of the process where brackets are nested deeply, and a few lines of
anchors can stand for billions of values. Neither raises an error that could be caught.
"""

from __future__ import annotations

import yaml

MAX_DEPTH = 50
MAX_VALUES = 100_000


class YamlTextError(ValueError):
    """A text that is no YAML; ``line`` is where, from 1, if that is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def check_yaml(text: str) -> None:
    """Refuse what cannot be parsed, or not without harm.

    Args:
        text: One YAML document.

    Raises:
        YamlTextError: If it is no YAML, is nested more than ``MAX_DEPTH`` deep, or stands for more
            than ``MAX_VALUES`` values.
    """
    open_sizes, sizes, anchors = [0], {}, [None]
    try:
        # Events come one by one; nothing here recurses.
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.CollectionStartEvent):
                if len(open_sizes) > MAX_DEPTH:
                    raise YamlTextError(f"nested more than {MAX_DEPTH} levels deep", line)
                open_sizes.append(1)
                anchors.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                size = open_sizes.pop()
                sizes[anchors.pop()] = size
                open_sizes[-1] += size
            elif isinstance(event, yaml.AliasEvent):
                open_sizes[-1] += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
                open_sizes[-1] += 1
            if open_sizes[-1] > MAX_VALUES:
                raise YamlTextError(f"holds more than {MAX_VALUES:,} values", line)
    except yaml.YAMLError as error:
        raise describe_yaml_error(error) from None


def describe_yaml_error(error: yaml.YAMLError) -> YamlTextError:
    """The same in one line of text, and the line of the file."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None)
    words = " ".join(str(reason or error).split())
    if words == "found unhashable key":
        words = "a list or an object stands where a key does"
    return YamlTextError(words, None if mark is None else mark.line + 1)
