"""The configurations that a command line names: files, shipped ones by name, and key=value."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from bge_pruning.config.schema import Config, ConfigError

# setup.py installs the repository's configs/ inside the package; a clone has them beside it.
FOLDERS = tuple(folder / "configs" for folder in Path(__file__).parents[1:3])
CONFIG_HELP = (
    "YAML files, or names of shipped ones such as bge_m3/target_50pct, merged left to right, and "
    "key=value"
)
# The keys of a run, with a value of each to show.
KEYS = {field.name: "true" if field.type == "bool" else "..." for field in fields(Config)}


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split positional arguments into configurations and ``key=value`` overrides."""
    overrides = [a for a in arguments if "=" in a and not _exists(a)]
    return [a for a in arguments if a not in overrides], overrides


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or holding a null byte: no file has this name
        return False


def list_shipped() -> dict[str, Path]:
    """The shipped configurations by name, such as ``bge_m3/target_50pct``."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    files = sorted(folder.glob("*/*.yaml")) if folder else []
    return {f"{path.parent.name}/{path.stem}": path for path in files}


def find_config(name: str | Path) -> Path:
    """Find the file of this path, or else the shipped one of this name, with or without ``.yaml``.

    Raises:
        ConfigError: If there is neither.
    """
    path = Path(name)
    if _exists(path):
        return path
    shipped, asked = list_shipped(), str(name).removesuffix(".yaml")
    if asked in shipped:
        return shipped[asked]
    fix = "check the path"
    close = _close_names(asked, list(shipped))
    # What ends in .yaml and is like none of them was meant as a path.
    if shipped and (close or asked == str(name)):
        hint = f": did you mean {' or '.join(close)}? There are" if close else ":"
        fix += f", or name a shipped configuration{hint} {', '.join(shipped)}"
    raise ConfigError(f"{name}: no such file. To fix, {fix}.")


def _close_names(asked: str, names: Sequence[str]) -> list[str]:
    """Names of which all or the last part resembles what was asked for."""
    found = difflib.get_close_matches(asked.removeprefix("configs/"), names, n=3, cutoff=0.8)
    last = asked.rpartition("/")[2]
    parts = difflib.get_close_matches(last, {name.rpartition("/")[2] for name in names}, cutoff=0.8)
    found += [name for part in parts for name in names if name.endswith(f"/{part}")]
    return list(dict.fromkeys(found))[:3]
