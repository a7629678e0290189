"""Arrays on disk are whole or not there."""

import re

import numpy as np
import pytest

from bge_pruning.datasets.array_files import load_array, save_array


def test_round_trip(tmp_path):
    path = tmp_path / "a" / "b" / "x.npy"
    for array in (np.arange(3), np.ones((2, 2), np.float16)):
        save_array(array, path)
        loaded = load_array(path)
        assert isinstance(loaded, np.memmap) and loaded.dtype == array.dtype
        assert (loaded == array).all()


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    def fail(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_array(np.arange(3), tmp_path / "x.npy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_damaged_file(content, tmp_path):
    path = tmp_path / "x.npy"
    save_array(np.arange(100), path)
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    message = rf"^{re.escape(str(path))}: damaged or not complete \(.*To fix, delete it; it is made"
    with pytest.raises(ValueError, match=message):
        load_array(path)
