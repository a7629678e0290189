"""Turn an error into one line and an exit code, or into a warning where the work is optional.

The errors of a command line, too.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NoReturn, TextIO

from bge_pruning.utils.run_log import FILE_ONLY, SIGNALS, StoppedError, signal_of

log = logging.getLogger(__name__)

EXIT_FAILURE, EXIT_USAGE = 1, 2
# What to do about an error of the operating system.
_SPACE = "free space on its disk, or choose a folder on another one, and run the command again"
_RIGHTS = "choose a place that you may read and write"
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another name",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "choose a folder; a part of the path is a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
# What torch and NumPy say when a disk is full; neither names the reason or the file.
CUT_OFF = re.compile(
    r"PytorchStreamWriter failed|inline_container.*unexpected pos|\d+ requested and \d+ written"
)
EXIT_SIGNAL = 128  # and the number of the signal, as in a shell
# Yellow and red.
COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m"}


# What argparse says, and what we say.
ARGPARSE = (
    (r"^argument ", ""),
    (r"invalid int value: ", "expected a whole number, not "),
    (r"invalid float value: ", "expected a number, not "),
    (r"invalid choice: (.*) \(choose from (.*)\)$", r"\1 is not one of \2"),
    (r"expected one argument$", "expected a value"),
    (r"expected at least one argument$", "expected a value or more"),
)


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are one line, which names the option or the key that was meant.

    Args:
        example: Arguments that show the use of the command.
        keys: What may be given as ``key=value``, with a value of each.
    """

    def __init__(
        self, prog: str | None, description: str | None, example: str, keys: Mapping[str, str]
    ) -> None:
        called = prog or f"python {sys.argv[0]}"
        super().__init__(prog, description=description, epilog=f"example: {called} {example}")
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.allow_abbrev = False
        # What may be a value, though it begins with "-": a slice such as -400: too.
        self._negative_number_matcher = re.compile(r"-\d+$|-\d*\.\d+$|-\d+:(-?\d+)?$")
        self.keys = keys

    def read(self, words: Sequence[str] | None) -> argparse.Namespace:
        """Parse the words, by default those of the process."""
        args, unknown = self.parse_known_args(words)
        if not unknown:
            return args
        name = next((word for word in unknown if word.startswith("-")), None)
        if name is None:
            self.error(f"unexpected {unknown[0]!r}. To fix, see --help.")
        name = name.partition("=")[0]
        key = name.strip("-").replace("-", "_")
        options = [option for action in self._actions for option in action.option_strings]
        close = [key] if key in self.keys else difflib.get_close_matches(name, options, n=1)
        close = close or difflib.get_close_matches(key, self.keys, n=1)
        meant = [f"{word}={self.keys[word]}" if word in self.keys else word for word in close]
        fix = f": did you mean {meant[0]}?" if meant else ". To fix, see --help."
        return self.error(f"there is no option {name}{fix}")

    def error(self, message: str) -> NoReturn:
        """End the process with the code of wrong usage."""
        for theirs, ours in ARGPARSE:
            message = re.sub(theirs, ours, message)
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line(message)}\n")


def run_command(command: Callable[[], None], slow: bool = False) -> int:
    """Run a command; an expected failure becomes one line on stderr.

    A ``slow`` one, which has to load its libraries for seconds, first logs that it does.

    Set ``BGE_PRUNING_TRACEBACK=1`` to see where it came from.

    Returns:
        Exit code: 0, 1 for a failure, 2 for a wrong configuration or argument, 130 after Ctrl-C,
        143 after SIGTERM.
    """
    setup_logging()
    if slow:
        log.info("loading libraries")
    try:
        command()
    except StoppedError as error:
        return _report(error, EXIT_SIGNAL + error.number)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # A wrong configuration says that it is one: config is a layer of its own.
        return _report(error, getattr(error, "exit_code", EXIT_FAILURE))
    except (KeyboardInterrupt, SystemExit) as error:
        if (number := signal_of(error)) is None:
            raise
        return _report(StoppedError(f"stopped by {SIGNALS[number]}"), EXIT_SIGNAL + number)
    return 0


def setup_logging() -> None:
    """Messages of this package go to stderr, one line each, from rank 0; errors from all ranks."""
    logger = logging.getLogger("bge_pruning")
    first = os.environ.get("RANK", "0") == "0"
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(ConsoleFormatter(coloured=is_coloured(sys.stderr)))
        handler.addFilter(lambda record: not getattr(record, FILE_ONLY, False))
        handler.setLevel(logging.INFO if first else logging.ERROR)
        logger.addHandler(handler)
        logger.propagate = False
    # Warnings of the other ranks are for the log file of the run.
    logger.setLevel(logging.INFO if first else logging.WARNING)


def is_coloured(stream: TextIO) -> bool:
    """Whether a stream is a terminal whose owner has not asked for plain text (NO_COLOR)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class ConsoleFormatter(logging.Formatter):
    """Time and message; a warning or an error says that it is one, in yellow or red if coloured."""

    def __init__(self, coloured: bool) -> None:
        super().__init__("%(asctime)s %(word)s%(message)s", datefmt="%H:%M:%S")
        self.coloured = coloured

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (of the library)
        """Format the line."""
        word = f"{record.levelname}:" if record.levelno >= logging.WARNING else ""
        if word and self.coloured:
            word = f"{COLOURS.get(record.levelno, '')}{word}\x1b[0m"
        record.word = f"{word} " if word else ""
        return super().formatMessage(record)


def _report(error: BaseException, code: int) -> int:
    if os.environ.get("BGE_PRUNING_TRACEBACK"):
        traceback.print_exc()
    rank = os.environ.get("RANK")
    if isinstance(error, StoppedError) and rank not in (None, "0"):
        return code  # all ranks stop, and the first one says so
    where = f" (rank {rank})" if rank not in (None, "0") else ""
    sys.stderr.write(f"error{where}: {one_line(describe_error(error))}\n")
    return code


def describe_error(error: BaseException) -> str:
    """What happened, and what to do about it where the error itself does not say so.

    The messages of this project do; those of the operating system and of torch do not.
    """
    text = str(error)
    if "To fix" in text:
        return text
    if isinstance(error, OSError) and error.errno in ADVICE:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        place = f"{' and '.join(names)}: " if names else ""
        return f"{place}{error.strerror}. To fix, {ADVICE[error.errno]}."
    if isinstance(error, RuntimeError | OSError) and CUT_OFF.search(text):
        return f"a file cannot be written to its end. To fix, {ADVICE[errno.ENOSPC]}."
    return text


def one_line(text: str) -> str:
    """A message as one line of a terminal, whatever a file name or a value in it holds.

    Lines are joined, and what would move the cursor, ring or change colours is written out.
    """
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


@contextmanager
def warn_only(what: str, fix: str) -> Iterator[None]:
    """Turn any error inside into a logged warning with its reason, its place and the fix."""
    try:
        yield
    except Exception as error:  # whatever a drawing or a network library raises
        kind = type(error).__name__
        message = "%s failed, and the run goes on without it: %s: %s. To fix, %s."
        log.warning(message, what, kind, error, fix, exc_info=True)


def import_optional(name: str, extra: str) -> ModuleType:
    """Import a library that an extra of this package installs; an ``ImportError`` says which."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(
            f"{error.name} is not installed, and this needs it. To fix, pip install -e '.[{extra}]'"
        ) from error


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line now, by default to standard output; only commands own the terminal."""
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()
