"""Read the checkpoint folder that the ranks of a sharded run wrote together.

The folder holds a file of each rank and ``.metadata``, a pickle that says which part of which value
lies where. torch's own reader would run code that either of them holds; here only plain types are
allowed, by name.
"""

from __future__ import annotations

import io
import math
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA_FILE = ".metadata"
# torch's classes that describe tensors and their parts, by module.
DTYPES = {name for name in dir(torch) if type(getattr(torch, name)) is torch.dtype}
ALLOWED = {
    "torch.distributed.checkpoint.metadata": set(
        "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta "
        "TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING".split()
    ),
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *DTYPES},
    "collections": {"OrderedDict"},
}
PATHS = {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
# What extraction needs; the optimizer's state stays where it is.
NEEDED = (("state", "model"), ("state", "callbacks", "RunMetadataCallback"), ("state", "timestamp"))


class _Unpickler(pickle.Unpickler):
    """Find the types that a description of tensors needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """A type by name."""
        if module.split(".")[0] == "pathlib" and name in PATHS:
            return pathlib.PurePath  # where it was written may be another system
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not a type of a checkpoint")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """Load values other than tensors as far as torch's ``weights_only`` loading allows."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Unpickle a value; the default planner would run what it holds."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def is_sharded(path: Path) -> bool:
    """Whether a path is the checkpoint folder of a sharded run."""
    return path.is_dir() and (path / METADATA_FILE).is_file()


def read_metadata(folder: Path) -> Metadata:
    """Which part of which value lies where."""
    with (folder / METADATA_FILE).open("rb") as file:
        metadata = _Unpickler(file).load()
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a file of the folder")
    return metadata


def read_sharded_state(folder: Path) -> dict[str, Any]:
    """What extraction needs of a checkpoint folder, with whole tensors in memory.

    Returns:
        As of a checkpoint file: ``{"state": {"model": ..., "callbacks": ..., "timestamp": ...}}``.
    """
    metadata = read_metadata(folder)
    paths = metadata.planner_data
    names = [n for n in paths if any(paths[n][: len(needed)] == needed for needed in NEEDED)]
    values = {name: _place_for(name, metadata) for name in names}
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(values, metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    state: dict[str, Any] = {}
    for name, value in values.items():
        set_element(state, paths[name], value)
    return state


def _place_for(name: str, metadata: Metadata) -> Tensor | None:
    """An empty tensor for a value that is one; torch's reader would leave gaps unnoticed."""
    described = metadata.state_dict_metadata[name]
    if not isinstance(described, TensorStorageMetadata):
        if MetadataIndex(name) not in metadata.storage_data:
            raise ValueError(f"{name} is missing")
        return None
    there = [c for c in described.chunks if MetadataIndex(name, c.offsets) in metadata.storage_data]
    filled, size = sum(math.prod(chunk.sizes) for chunk in there), math.prod(described.size)
    if filled != size:
        raise ValueError(f"{filled} of {size} numbers of {name} are there")
    return torch.empty(described.size, dtype=described.properties.dtype)


def check_whole_folder(folder: Path) -> None:
    """Read every part of a checkpoint folder and compare it with its checksums."""
    try:
        for index, info in read_metadata(folder).storage_data.items():
            with (folder / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = file.read(info.length)
            if len(content) != info.length:
                raise ValueError(f"{info.relative_path} ends too early")
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if archive.testzip() is not None:
                    raise ValueError(f"the checksum of {index.fqn} is wrong")
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{folder}: damaged or not complete ({error}).") from error
