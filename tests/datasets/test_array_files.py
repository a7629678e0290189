"""Arrays on disk are whole or not there."""

import re

import numpy as np
import pytest

from bge_pruning.datasets import teacher_vectors as array_files
from bge_pruning.datasets.teacher_vectors import compute_digest, load_array, new_arrays, save_array


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


def test_arrays_are_filled_in_place_and_named_at_the_end(tmp_path):
    paths = {name: tmp_path / "new" / f"{name}.npy" for name in ("a", "b", "unused")}
    with new_arrays(paths) as allocate:
        for name, dtype in (("a", np.float32), ("b", np.float16)):
            array = allocate(name, (3, 2), dtype)
            assert (array == 0).all()
            array[1] = 7
        assert not any(path.is_file() for path in paths.values())
    for name, dtype in (("a", np.float32), ("b", np.float16)):
        assert load_array(paths[name]).tolist() == [[0, 0], [7, 7], [0, 0]]
        assert load_array(paths[name]).dtype == dtype
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.npy", "b.npy"]


def test_nothing_is_left_of_arrays_that_were_not_filled(tmp_path):
    def fill() -> None:
        with new_arrays({"a": tmp_path / "a.npy"}) as allocate:
            allocate("a", (3,), np.float32)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_a_damaged_file(content, tmp_path):
    path = tmp_path / "x.npy"
    save_array(np.arange(100), path)
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    message = rf"^{re.escape(str(path))}: damaged or not complete \(.*To fix, delete it; it is made"
    with pytest.raises(ValueError, match=message):
        load_array(path)


def test_numbers_that_changed_on_the_disk_are_noticed(tmp_path):
    """The size is right, and NumPy would read it."""
    path = tmp_path / "x.npy"
    save_array(np.arange(100), path)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"its checksum is not that of its content\)\. To fix, del"
    ):
        load_array(path)


def test_an_array_of_another_version_is_noticed(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(100))
    with pytest.raises(
        ValueError, match=r"not end with the mark of version 1\)\. To fix, delete it"
    ):
        load_array(tmp_path / "x.npy")


def test_the_checksum_of_a_large_file_is_of_blocks_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "BLOCK", 16)
    monkeypatch.setattr(array_files, "BLOCKS", 4)
    path = tmp_path / "x"
    content = bytearray(16 * 100 + 3)
    path.write_bytes(content)
    before = compute_digest(path, len(content))
    for place, noticed in ((0, True), (len(content) - 1, True), (17, False), (33 * 16, True)):
        path.write_bytes(content[:place] + b"x" + content[place + 1 :])
        assert (compute_digest(path, len(content)) != before) == noticed
    path.write_bytes(content)
    assert compute_digest(path, len(content) - 1) != before
