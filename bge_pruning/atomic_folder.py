"""Output folders that are either absent or complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder to write into, renamed to ``output`` on success.

    If the body raises, the temporary folder is removed and an earlier ``output`` is untouched.

    Args:
        output: Folder to make.
        overwrite: Replace an existing folder; it stays until the new one is complete.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: If ``output`` exists, is not an empty folder, and ``overwrite`` is false.
    """
    occupied = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if occupied and not overwrite:
        raise FileExistsError(
            f"{output} exists and is kept. To fix, choose another folder or pass overwrite."
        )
    if output.is_file():
        raise FileExistsError(f"{output} is a file. To fix, choose a folder that does not exist.")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _swap(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, output: Path) -> None:
    """Rename ``staging`` to ``output``; an old folder is put back if that fails."""
    if not output.exists():
        staging.rename(output)
        return
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
