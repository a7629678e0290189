"""Output folders that are either absent or complete."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(output: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to write into, renamed to ``output`` when the block ends well.

    If the block raises, the temporary folder is removed and an earlier ``output`` is untouched.

    Args:
        output: Folder to make. Its parents are made as needed.
        marker: Name of a file that every folder of this kind holds.
        overwrite: Replace an existing folder of this kind; it stays until the new one is complete.

    Yields:
        The folder to write into, empty.

    Raises:
        FileExistsError: If ``output`` exists, is not an empty folder, and may not be replaced:
            ``overwrite`` is false, or it does not hold ``marker``.
    """
    check_free(output, marker, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    staging = output.with_name(f".{output.name}.partial-{mark}")
    old = output.with_name(f".{output.name}.replaced-{mark}")
    staging.mkdir()
    try:
        yield staging
        check_free(output, marker, overwrite)  # it may have appeared meanwhile
        if _is_there(output):
            output.rename(old)
        staging.rename(output)
    except BaseException:
        if _is_there(old) and not _is_there(output):
            old.rename(output)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if _is_there(output):
            _remove(old)


def check_free(output: Path, marker: str, overwrite: bool) -> None:
    """Refuse a folder that may not be written, before long work is done for it.

    Args:
        output: Folder to make.
        marker: See :func:`atomic_folder`.
        overwrite: See :func:`atomic_folder`.

    Raises:
        FileExistsError: See :func:`atomic_folder`.
    """
    if output.is_file():
        raise FileExistsError(f"{output} is a file. To fix, choose a folder that does not exist.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{output} exists and is kept. To fix, choose another folder, or pass --overwrite."
        )
    if not (output / marker).is_file():
        raise FileExistsError(
            f"{output} holds no {marker}, so it is nothing of this kind and is kept although "
            f"overwriting was asked for. To fix, choose another folder, or delete it yourself."
        )


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _remove(path: Path) -> None:
    """Delete a folder, or a link to one; what a link points to is somebody else's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
