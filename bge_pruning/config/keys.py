"""What a key of the YAML files says of its values, and the error of one that does not fit."""

from __future__ import annotations

from dataclasses import field
from typing import Any

# Units of a time string: batches and epochs, or also shares of the run.
COUNTS = ("ba", "ep")
SHARES = ("ba", "ep", "dur")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, where and how to fix it."""

    exit_code = 2  # of a command, as for a wrong argument


def key(default: Any, **rules: Any) -> Any:
    """A key with rules that :mod:`bge_pruning.config.checks` enforces where it is not null.

    Args:
        default: A list is copied.
        rules: ``bound``, a range such as ``above 0``, with ``meaning`` and ``example`` for the
            message; ``choices``, the allowed values, or the allowed items of a list; ``units``,
            those of a time string; ``needs``, options of an export, one of which must be given.
    """
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=rules)
    return field(default=default, metadata=rules)


def weight() -> Any:
    """A key for the weight of a part of the loss."""
    return key(0.0, bound="0 or more")
