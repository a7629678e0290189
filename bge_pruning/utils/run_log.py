"""The log file of a run, and the exception of a run that was stopped on purpose."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any


class StoppedError(Exception):
    """Raised when a run is stopped on purpose; the message says how to resume."""


# Attribute of a record that the console does not show.
FILE_ONLY = "file_only"
LOG = "train.log"
PACKAGE = "bge_pruning"
EXPECTED = (ValueError, OSError, RuntimeError, StoppedError, KeyboardInterrupt)
log = logging.getLogger(__name__)


@functools.cache
def log_hub(name: str) -> None:
    """Say once that the hub is asked: without a network its client tries for minutes."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        log.info("contacting the hub for %s", name)


class RunLog(logging.Handler):
    """Keep log records until the run has a folder, then append them to a file there.

    A context manager. The first rank writes everything from INFO on, the others their warnings and
    errors with their rank, into the same file. The end of the run is written too, also if it is an
    error.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        where = "" if rank == 0 else f"rank {rank}: "
        form = f"%(asctime)s %(levelname)s {where}%(message)s"
        self.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%d %H:%M:%S"))
        self.path: Path | None = None
        self._kept: list[str] = []
        self._before = logging.NOTSET

    def emit(self, record: logging.LogRecord) -> None:
        """Write or keep a record; a full disk must not end a training."""
        try:
            self._kept.append(self.format(record) + "\n")
            if self.path is not None:
                self._flush()
        except OSError:
            self.handleError(record)

    def open(self, path: Path) -> None:
        """Write to a file from now on; an existing one is appended to."""
        self.path = path
        self._flush()

    def _flush(self) -> None:
        # Opened anew each time: in one write, so that the lines of the ranks do not mix.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(self._kept))
        self._kept = []

    def __enter__(self) -> RunLog:
        logger = logging.getLogger(PACKAGE)
        self._before = logger.level
        if logger.getEffectiveLevel() > self.level:
            logger.setLevel(self.level)
        logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: Any
    ) -> None:
        if error is not None:  # the console gets it from the command
            # Unexpected errors are logged with their traceback; the message of others is enough.
            shown = None if isinstance(error, EXPECTED) else (kind, error, place)
            what = f"ended by {kind.__name__}: {error}"
            log.error("%s", what, exc_info=shown, extra={FILE_ONLY: True})
        logger = logging.getLogger(PACKAGE)
        logger.removeHandler(self)
        logger.setLevel(self._before)
