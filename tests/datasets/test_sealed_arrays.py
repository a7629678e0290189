"""Arrays on disk are whole or not there."""

import re

import numpy as np
import pytest

from bge_pruning.datasets import text_files
from bge_pruning.datasets.hard_negatives import load_array, save_array
from bge_pruning.datasets.text_files import compute_digest


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


def test_damaged_files(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100))
    other_version = path.read_bytes()
    save_array(np.arange(100), path)
    whole = path.read_bytes()
    changed = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]  # NumPy would read it
    contents = {b"": "it is too short", b"text": "it is too short", whole[:200]: "", whole[:-1]: ""}
    contents[changed] = "its checksum is not that of its content"
    contents[other_version] = "it does not end with the mark of version 1"
    for content, reason in contents.items():
        path.write_bytes(content)
        message = rf"^{re.escape(str(path))}: damaged or not complete \({reason}.*To fix, delete"
        with pytest.raises(ValueError, match=message):
            load_array(path)


def test_the_checksum_of_a_large_file_is_of_blocks_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK", 16)
    monkeypatch.setattr(text_files, "BLOCKS", 4)
    path = tmp_path / "x"
    content = bytearray(16 * 100 + 3)
    path.write_bytes(content)
    before = compute_digest(path, len(content))
    for place, noticed in ((0, True), (len(content) - 1, True), (17, False), (33 * 16, True)):
        path.write_bytes(content[:place] + b"x" + content[place + 1 :])
        assert (compute_digest(path, len(content)) != before) == noticed
    path.write_bytes(content)
    assert compute_digest(path, len(content) - 1) != before
