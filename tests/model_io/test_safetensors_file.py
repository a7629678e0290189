"""Files that the library itself reads, written in pieces."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bge_pruning.model_io import model_folder
from bge_pruning.model_io.model_folder import write_safetensors
from bge_pruning.utils.model_analysis import measure_peak_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of every kind that a model may hold, and some that it does not."""
    generator = torch.Generator().manual_seed(4)
    return {
        "matrix.weight": torch.randn(7, 5, generator=generator),
        "with a 'quote' and ü": torch.randn(3, generator=generator),
        "half": torch.randn(4, 4, generator=generator).half(),
        "transposed": torch.randn(6, 2, generator=generator).t(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, 2, generator=generator)),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("block", [1, 4, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_was_written(dtype, block, tensors, path, monkeypatch):
    monkeypatch.setattr(model_folder, "BLOCK", block)
    write_safetensors(path, tensors, dtype)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype)), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_numbers_begin_where_a_mapped_file_is_read_best(tensors, path):
    write_safetensors(path, tensors, torch.float32)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0
    assert json.loads(path.read_bytes()[8 : 8 + length])["scalar"]["shape"] == []


def test_little_memory_is_taken(path, monkeypatch):
    monkeypatch.setattr(model_folder, "BLOCK", 1000)
    tensors = {"a": torch.ones(100, 100), "b": torch.ones(100, 100)}
    peak = measure_peak_bytes(lambda: write_safetensors(path, tensors, torch.float16))
    # One piece in half precision, and what tells whether its numbers are in range.
    assert 0 < peak <= 10 * 1000


def test_what_is_not_written(tensors, path):
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=re.escape(path.name)):
        write_safetensors(path, tensors, torch.float32)
    assert path.read_bytes() == b"mine"
    path.unlink()
    message = r"^w holds 70000, and float16 ends at 65504\. To fix, write"
    with pytest.raises(ValueError, match=message):
        write_safetensors(path, {"w": torch.tensor([7e4])}, torch.float16)
    with pytest.raises(ValueError, match=r"^dtype torch\.int8 is not one of .*To fix, choose"):
        write_safetensors(path.with_name("b"), {"w": torch.ones(1)}, torch.int8)
    assert not path.with_name("b").exists()
