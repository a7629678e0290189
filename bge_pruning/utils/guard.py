"""Keeps what only informs (pictures, reports, uploads) from ending what took hours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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
