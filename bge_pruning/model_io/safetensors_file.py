"""Writing a safetensors file piece by piece, in the precision that is asked for.

The library's own writer takes all tensors at once, so rounding to half precision would take half as
much memory again as the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bge_pruning.model_io.precision import blocks, check_dtype, round_tensor

# By the names of the format.
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Readers map the file: numbers then lie in memory as they lie in it. The format demands 8.
ALIGNMENT = 64


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write tensors one after the other.

    Args:
        path: File to make.
        tensors: By name, of any precision.
        dtype: Precision on disk, one of :data:`~bge_pruning.model_io.precision.DTYPES`.

    Raises:
        FileExistsError: If the file exists; somebody may have mapped it.
        ValueError: If the precision is unknown, or a number is beyond its range.
    """
    check_dtype(dtype)
    with path.open("xb") as file:
        file.write(_header(tensors, dtype))
        for name, tensor in tensors.items():
            for block in blocks(tensor.contiguous()):
                file.write(round_tensor(name, block, dtype).view(torch.uint8).numpy())


def _header(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    """Length in 8 bytes, then names, shapes and places as JSON, filled up with spaces."""
    content: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + dtype.itemsize * tensor.numel()
        content[name] = {
            "dtype": NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
