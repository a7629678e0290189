"""Keeping optional work (pictures, reports, optional libraries) from ending what took hours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

log = logging.getLogger(__name__)


@contextmanager
def warn_only(what: str, fix: str) -> Iterator[None]:
    """Turns any error inside into a logged warning with its reason and its place.

    Args:
        what: What is done inside, for the message.
        fix: How to do it again.
    """
    try:
        yield
    except Exception as error:  # whatever a drawing or a network library raises
        log.warning(
            "%s failed, and the run goes on without it: %s: %s. To fix, %s.",
            what,
            type(error).__name__,
            error,
            fix,
            exc_info=True,
        )


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
