"""Calls a command line in this process as a new process would be, and judges how it ended."""

import contextlib
import hashlib
import io
import re
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.common.script_process import new_process

SCRIPTS = Path(__file__).parents[2] / "scripts"
SECONDS = 30
MORE_MEMORY = 4 * 2**30
UNCLEAR = re.compile(
    r"Traceback|alloc|MemoryError|object is not|has no attribute|unsupported operand|object at 0x|"
    r"not subscriptable|unhashable|positional argument|invalid literal|<class '"
)


# With the reason in the words of the library that loads a model, and advice of ours.
FOREIGN = re.compile(r"does not load the extracted model|cannot be loaded on")


class HangError(BaseException):
    """A command took too long; no handler of errors may take it for one of its own."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    err: str
    trace: str  # of an exception that nobody handled, or empty

    def defect(self) -> str:
        """What is wrong with this end, or nothing."""
        if self.trace:
            return self.trace
        if self.code == 0:
            return ""
        if self.code not in (1, 2):
            return f"exit code {self.code}"
        errors = re.findall(r"^(?:\S+: )?error: .*", self.err, re.MULTILINE)
        lines = self.err.rstrip("\n").splitlines()
        if len(errors) != 1 or not lines or lines[-1] != errors[0]:
            return f"not one error in the last line: {self.err[-600:]}"
        if (found := UNCLEAR.search(errors[0])) and not FOREIGN.search(errors[0]):
            return f"unclear ({found.group()}): {errors[0][:600]}"
        usage = not errors[0].startswith("error: ")
        if not usage and not re.search(r"To fix|did you mean|known:", errors[0]):
            return f"no advice: {errors[0][:600]}"
        return ""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Time, and memory: a size that nobody checked is an error here and takes no machine down."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    soft = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def call(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Outcome:
    """Run a command line and look at its end."""
    out, err, trace, code = io.StringIO(), io.StringIO(), "", -1
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        new_process(),
    ):
        warnings.simplefilter("ignore")
        try:
            with _limited():
                code = main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # noqa: BLE001, RUF100
            trace = _describe(error)
    return Outcome(code, err.getvalue(), trace)


def _describe(error: BaseException) -> str:
    """The error and the last frames of this project, the same for the same defect."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "bge_pruning/" in f.filename]
    where = " < ".join(f"{Path(f.filename).name}:{f.name}" for f in reversed(frames[-3:]))
    return f"{type(error).__name__} in {where}: {str(error)[:200]}"


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
