"""Libraries that only some commands need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_optional(name: str, extra: str) -> ModuleType:
    """A library that an extra of this package installs.

    Args:
        name: Module to import.
        extra: Extra in ``setup.py`` that installs it.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(
            f"{error.name} is not installed, and this needs it. To fix, pip install -e '.[{extra}]'"
        ) from error
