"""Write files and folders that are either absent or complete, and lock them."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import ENOLCK, EOPNOTSUPP
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

# Of <linux/fs.h> and <fcntl.h>: swap two names in one step, relative to the working directory.
RENAME_EXCHANGE = 2
AT_FDCWD = -100


@contextmanager
def atomic_folder(output: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to write into, which becomes ``output`` when the block ends well.

    If the block raises, the temporary folder is removed, also parents of ``output`` made for it,
    and an earlier ``output`` is untouched. If the process is killed, the next one that writes
    ``output`` removes what is left of it. ``marker`` is a file that every folder of this kind has.

    Raises:
        FileExistsError: If ``output`` exists, is not an empty folder, and may not be replaced:
            ``overwrite`` is false, or it does not hold ``marker``.
        OSError: If no folder can be made there.
        ValueError: If it is the working folder, or a disk, which cannot be renamed.
    """
    _check_place(output)
    clean_up(output)
    check_free(output, marker, overwrite)
    with _folders_above(output):
        staging, lock = _make_locked(output)
        try:
            yield staging
            check_free(output, marker, overwrite)  # it may have appeared meanwhile
            for path in (*staging.rglob("*"), staging):
                _flush(path)
            _put_in_place(staging, output)
            _flush(output.parent)  # its list of names
        finally:
            _remove(staging)  # or what has changed places with it
            if lock is not None:
                os.close(lock)


def _check_place(output: Path) -> None:
    """Refuse what no folder can take the place of in one step, such as a volume of a container."""
    nameless = output.name in ("", "..")
    if nameless or (output.exists() and (os.path.ismount(output) or output.samefile("."))):
        raise ValueError(
            f"'{output}' is the working folder or a disk of its own, which no finished folder can "
            f"be put in place of. To fix, choose a folder inside it, such as {output / 'model'}."
        )


@contextmanager
def _folders_above(output: Path) -> Iterator[None]:
    """Make the missing ones; remove those that are still empty at the end."""
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        _make(output.parent, output, parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _make(folder: Path, output: Path, **options: bool) -> None:
    try:
        folder.mkdir(**options)
    except OSError as error:
        raise OSError(
            f"{output}: no folder can be made there ({error.strerror}). To fix, choose a place "
            f"that is there and that you may write to."
        ) from error


def check_free(output: Path, marker: str, overwrite: bool) -> None:
    """Refuse a folder that may not be written, as :func:`atomic_folder` does, before long work."""
    if output.is_file():
        raise FileExistsError(f"{output} is a file. To fix, choose a folder that does not exist.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        fix = "choose another folder, or pass --overwrite"
        raise FileExistsError(f"{output} exists and is kept. To fix, {fix}.")
    if not (output / marker).is_file():
        raise FileExistsError(
            f"{output} holds no {marker}, so it is not a folder of this kind and is kept although "
            f"overwriting was requested. To fix, choose another folder, or delete it yourself."
        )


def clean_up(output: Path) -> None:
    """Remove the left-overs of killed processes, and restore folders that they had set aside.

    What a living process is writing is left alone.
    """
    for mark in _marks(output, "partial"):
        path = _sibling(output, "partial", mark)
        # A folder may be locked by its process, or lie where there are no locks and nobody can
        # tell; a link is an earlier output that was about to be removed.
        with suppress(OSError):
            lock = None if path.is_symlink() else _lock(path)
            _remove(path)
            if lock is not None:
                os.close(lock)
    for mark in _marks(output, "replaced"):
        old = _sibling(output, "replaced", mark)
        if os.path.lexists(_sibling(output, "partial", mark)):
            continue
        if os.path.lexists(output):
            _remove(old)
        else:
            old.rename(output)


def _sibling(output: Path, kind: str, mark: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{mark}")


def _marks(output: Path, kind: str) -> list[str]:
    name = re.compile(rf"\.{re.escape(output.name)}\.{kind}-([0-9a-f]{{8}})")
    names = os.listdir(output.parent) if output.parent.is_dir() else []
    return [found.group(1) for found in map(name.fullmatch, names) if found]


def _make_locked(output: Path) -> tuple[Path, int | None]:
    """A new folder, and a lock on it that ends with this process (``None`` if there are none)."""
    while True:
        staging = _sibling(output, "partial", uuid.uuid4().hex[:8])
        _make(staging, output)
        try:
            lock = _lock(staging)
        except (FileNotFoundError, BlockingIOError):
            continue  # another process took it for a left-over before it was locked
        except OSError:
            return staging, None
        if staging.is_dir():
            return staging, lock
        os.close(lock)


def _lock(folder: Path) -> int:
    """A descriptor that holds the folder's lock; an ``OSError`` if there is none to have."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _put_in_place(staging: Path, output: Path) -> None:
    """Rename; an earlier output ends under the name of ``staging``, or is removed."""
    if not os.path.lexists(output):
        staging.rename(output)
    elif not _exchange(staging, output):
        old = _sibling(output, "replaced", staging.name[-8:])
        try:
            output.rename(old)
            staging.rename(output)
        finally:
            if os.path.lexists(output):
                _remove(old)
            else:
                old.rename(output)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; ``False`` if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that a power failure does not empty it."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a folder, or a link to one; what a link points to is somebody else's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_json(result: Mapping[str, Any], path: str | Path, *, overwrite: bool = False) -> None:
    """Write a result atomically, see :func:`atomic_file`; NaN is refused, as JSON has none."""
    refuse_existing([path], overwrite=overwrite)
    write_text(path, json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically; its folder is made."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(path: str | Path, unique: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place when the block ends well.

    Readers see the earlier file or the new one, never a part. If the block raises, what it wrote is
    removed; if it writes nothing, an earlier file stays. ``unique`` is for files that several may
    write at once: each killed process then leaves one, which otherwise the next writer replaces.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f"-{uuid.uuid4().hex[:8]}" if unique else ""
    partial = path.with_name(f".{path.stem}.partial{mark}{path.suffix}")
    try:
        partial.unlink(missing_ok=True)
        yield partial
        if os.path.lexists(partial):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(paths: Iterable[str | Path], *, overwrite: bool) -> None:
    """Stop before the long work whose result could not be written.

    Raises:
        OSError: If a file exists and ``overwrite`` is false, or cannot be written there.
    """
    for path in map(Path, paths):
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"{path} exists. To fix, choose another name or pass --overwrite."
            )
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder. To fix, name a file.")
        _refuse_unwritable(path, path.absolute().parent)


def refuse_unwritable_folders(folders: Mapping[str, str | Path]) -> None:
    """Stop before the long work whose results could not be written to folders, by their names.

    Raises:
        PermissionError: If nothing may be written there, or a part of the path is a file.
    """
    for key, folder in folders.items():
        _refuse_unwritable(f"{key} {folder}", Path(folder).absolute())


def _refuse_unwritable(what: str | Path, folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise PermissionError(
            f"{what} cannot be written: {there} is not a folder that may be written to. To fix, "
            f"choose another folder."
        )


def evaluation_files(path: str | Path) -> tuple[Path, Path]:
    """The two files of an evaluation: the JSON file and the Markdown table beside it."""
    path = Path(path)
    if not path.name:
        raise ValueError(f"'{path}' names no file. To fix, write e.g. evaluation.json.")
    table = path.with_suffix(".md")
    if table == path:
        raise ValueError(
            f"{path} is to hold JSON, and its table would have the same name. To fix, write "
            f"{path.with_suffix('.json')}."
        )
    return path, table


@contextmanager
def lock_of(path: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes from making a file; the lock ends with the process that holds it.

    Those that waited find the file there: look again. Where the file system has no locks, nobody
    waits, and several processes may make the file. Yields whether the lock is ours; without
    ``wait`` another process may have it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.lock")
    lock, ours = FileLock(file, timeout=-1 if wait else 0), True
    try:
        lock.acquire()
    except Timeout:
        ours = False
    except OSError as error:
        if error.errno not in (ENOLCK, EOPNOTSUPP):  # a file system without locks
            raise
        file.unlink(missing_ok=True)
    try:
        yield ours
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
            lock.release()
