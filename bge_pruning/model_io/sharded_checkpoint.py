"""Reading the checkpoint folder that the ranks of a sharded run wrote together.

The folder holds a file of each rank and ``.metadata``, a pickle that says which part of which value
lies where. It is read with an allow-list: names of plain types, and nothing that could be run.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

METADATA_FILE = ".metadata"

# torch's classes that describe tensors and their parts, by module.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name in dir(torch) if type(getattr(torch, name)) is torch.dtype)},
    "collections": {"OrderedDict"},
}
PATHS = {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}

# What extraction needs; the optimizer's state stays where it is.
NEEDED = (
    ("state", "model"),
    ("state", "callbacks", "RunMetadataCallback"),
    ("state", "timestamp"),
)


class _Unpickler(pickle.Unpickler):
    """Finds the types that a description of tensors needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """A type by name."""
        if module.split(".")[0] == "pathlib" and name in PATHS:
            return pathlib.PurePath  # where it was written may be another system
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not a type of a checkpoint")
        return super().find_class(module, name)


def is_sharded(path: Path) -> bool:
    """Whether a path is the checkpoint folder of a sharded run."""
    return path.is_dir() and (path / METADATA_FILE).is_file()


def read_sharded_state(folder: Path) -> dict[str, Any]:
    """What extraction needs of a checkpoint folder, with whole tensors in memory.

    Values other than tensors are read as far as torch's ``weights_only`` loading allows.

    Args:
        folder: Written by the ranks together; how many they were does not matter.

    Returns:
        As of a checkpoint file: ``{"state": {"model": ..., "callbacks": ..., "timestamp": ...}}``.

    Raises:
        ValueError: If a part is missing.
        Exception: Whatever a damaged file leads to.
    """
    metadata = read_metadata(folder)
    parts = _parts_by_name(metadata.storage_data)
    state: dict[str, Any] = {}
    with _slices(folder) as read:
        for name, path in metadata.planner_data.items():
            if any(path[: len(needed)] == needed for needed in NEEDED):
                described = metadata.state_dict_metadata[name]
                pieces = [(index.offset, read(info)) for index, info in parts.get(name, [])]
                _put(state, path, _join(name, described, pieces))
    return state


def read_metadata(folder: Path) -> Any:
    """Which part of which value lies where, torch's ``Metadata``.

    Raises:
        pickle.UnpicklingError: If the file holds anything but that.
        OSError: If there is none: writing it is the last thing that the ranks do.
    """
    with (folder / METADATA_FILE).open("rb") as file:
        return _Unpickler(file).load()


def check_whole_folder(folder: Path) -> None:
    """Read every part of a checkpoint folder and compare it with its checksums.

    Raises:
        ValueError: If a part is damaged or missing; the message says which.
    """
    try:
        metadata = read_metadata(folder)
        with _slices(folder) as read:
            for index, info in metadata.storage_data.items():
                with zipfile.ZipFile(io.BytesIO(read(info))) as archive:
                    if archive.testzip() is not None:
                        raise ValueError(f"the checksum of {index.fqn} is wrong")
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{folder}: damaged or not complete ({error}).") from error


def _parts_by_name(storage: Mapping[Any, Any]) -> dict[str, list[tuple[Any, Any]]]:
    parts: dict[str, list[tuple[Any, Any]]] = {}
    for index, info in storage.items():
        parts.setdefault(index.fqn, []).append((index, info))
    return parts


@contextmanager
def _slices(folder: Path) -> Iterator[Any]:
    """A function that reads a part; the files stay open inside."""
    files: dict[str, Any] = {}

    def read(info: Any) -> bytes:
        name = info.relative_path
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a file of the folder")
        if name not in files:
            files[name] = (folder / name).open("rb")
        files[name].seek(info.offset)
        content = files[name].read(info.length)
        if len(content) != info.length:
            raise ValueError(f"{name} ends too early")
        return content

    try:
        yield read
    finally:
        for file in files.values():
            file.close()


def _join(name: str, described: Any, pieces: Sequence[tuple[Any, bytes]]) -> Any:
    """A value of its parts: a tensor, or what was pickled."""
    values = [
        (offset, torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
        for offset, content in pieces
    ]
    if not hasattr(described, "size"):
        if len(values) != 1:
            raise ValueError(f"{name} is there {len(values)} times")
        return values[0][1]
    whole = torch.empty(described.size, dtype=described.properties.dtype)
    filled = sum(_fill(whole, offset, part) for offset, part in values)
    if filled != whole.numel():
        raise ValueError(f"{filled} of {whole.numel()} numbers of {name} are there")
    return whole


def _fill(whole: Tensor, offset: Sequence[int] | None, part: Tensor) -> int:
    """Copy a part to its place; the number of its elements."""
    start = offset or [0] * whole.ndim
    place = tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))
    whole[place].copy_(part)
    return part.numel()


def _put(state: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value at the end of a path of keys."""
    for key in path[:-1]:
        state = state.setdefault(key, {})
    state[path[-1]] = value
