"""Results files: written atomically, never over another one, with the versions behind them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPU = Path("/proc/cpuinfo")
LIBRARIES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "mteb",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
)


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a score depends on, if they are installed."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):  # a benchmark needs only some of them
            versions[name] = version(name)
    return versions


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """What a speed was measured on.

    Args:
        device: Torch device.

    Returns:
        ``cpu`` (its name), ``cores`` (that the system has) and ``gpu`` (its name, ``None`` if the
        device is none).
    """
    import torch

    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu}


def _cpu_name() -> str:
    lines = CPU.read_text(encoding="utf-8").splitlines() if CPU.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_json(result: Mapping[str, Any], path: str | Path, *, overwrite: bool = False) -> None:
    """Writes a result atomically: readers see the old file or the new one, never half of it.

    Args:
        result: JSON-ready; NaN is refused, as it is no JSON.
        path: File to write; its folder is made.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is false.
    """
    refuse_existing([path], overwrite=overwrite)
    write_text(path, json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(paths: Iterable[str | Path], *, overwrite: bool) -> None:
    """Stops before the long work whose result could not be written.

    Args:
        paths: Files that are to be written.
        overwrite: Whether existing files may be replaced.

    Raises:
        FileExistsError: If a file exists and ``overwrite`` is false.
        OSError: If one is a folder, or cannot be written where it is to be.
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
    """Stops before the long work whose results could not be written.

    Args:
        folders: Folders to write into, which may not be there yet, by what names them.

    Raises:
        PermissionError: If nothing may be written there, or a part of the path is a file.
    """
    for key, folder in folders.items():
        _refuse_unwritable(f"{key} {folder}", Path(folder).absolute())


def _refuse_unwritable(what: str | Path, folder: Path) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise PermissionError(
            f"{what} cannot be written: {there} is no folder that may be written to. To fix, "
            f"choose another folder."
        )


def evaluation_files(path: str | Path) -> tuple[Path, Path]:
    """The two files of an evaluation: the JSON file and the Markdown table beside it.

    Args:
        path: The JSON file.

    Raises:
        ValueError: If it is no name of a file, or that of its own table.
    """
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
