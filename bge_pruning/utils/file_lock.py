"""One process at a time: for files that several processes of one user would make at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOLCK, EOPNOTSUPP
from pathlib import Path

from filelock import FileLock, Timeout

# What a file system says that has no locks.
WITHOUT_LOCKS = (ENOLCK, EOPNOTSUPP)


@contextmanager
def lock_of(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from making a file; the lock ends with the process that holds it.

    Those that waited find the file there: look again. Where the file system has no locks, nobody
    waits, and several processes may make the file.

    Args:
        path: The file or folder that is to be made; its parent is made.
        wait: Wait until no other process has the lock.

    Yields:
        Whether it is ours; always if ``wait``.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.lock")
    lock, ours = FileLock(file, timeout=-1 if wait else 0), True
    try:
        lock.acquire()
    except Timeout:
        ours = False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        file.unlink(missing_ok=True)
    try:
        yield ours
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
            lock.release()
