"""One process at a time: for files that several processes of one user would make at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def lock_of(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from making a file; the lock ends with the process that holds it.

    Those that waited find the file there: look again. On a file system without locks nobody waits.

    Args:
        path: The file or folder that is to be made; its parent is made.
        wait: Wait until no other process has the lock.

    Yields:
        Whether it is ours; always if ``wait``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.lock")
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:
        file.unlink(missing_ok=True)
        yield True
        return
    try:
        yield True
    finally:
        file.unlink(missing_ok=True)
        lock.release()
