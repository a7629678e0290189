"""Folders that appear whole or not at all, and the record that tells a whole one."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from bge_pruning.utils.conversion_folder import (
    RECORD_FILE,
    atomic_folder,
    compute_sha256,
    is_complete,
    write_record,
)


def fill(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_text(name)
    write_record(folder, {"source_sha256": name})


@contextmanager
def interrupted(output: Path):
    """An overwriting write that is stopped half-way."""
    with atomic_folder(output, overwrite=True) as folder:
        fill(folder, "half")
        yield
        raise KeyboardInterrupt


def test_parents_are_made_and_nothing_is_left(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b"
    with atomic_folder(output) as folder:
        assert folder.parent == output.parent  # a rename works within one file system only
        assert not output.exists()
        fill(folder, "first")
    assert is_complete(output, "first")
    assert list(output.parent.iterdir()) == [output]


def test_overwrite_replaces_an_earlier_conversion(tmp_path: Path) -> None:
    output = tmp_path / "output"
    for name in ("first", "second"):
        with atomic_folder(output, overwrite=True) as folder:
            fill(folder, name)
    assert [path.name for path in (output / "sub").iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [output]


def test_overwrite_takes_an_empty_folder(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with atomic_folder(output, overwrite=True) as folder:
        fill(folder, "first")
    assert is_complete(output, "first")


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    message = r"holds no conversion\.json.*delete it yourself" if overwrite else "overwrite=True"
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    file.touch()
    for output in (folder, file):
        with pytest.raises(FileExistsError, match=message), atomic_folder(output, overwrite):
            pass
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "thesis.txt", "file"}


@pytest.mark.parametrize("earlier", [False, True])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, earlier: bool) -> None:
    output = tmp_path / "output"
    if earlier:
        output.mkdir()
        fill(output, "earlier")
    with pytest.raises(KeyboardInterrupt), interrupted(output):
        pass
    assert list(tmp_path.iterdir()) == ([output] if earlier else [])
    assert is_complete(output, "earlier") == earlier


def test_a_failing_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "output", Path.rename
    output.mkdir()
    fill(output, "earlier")

    def refuse(path: Path, target: Path) -> Path:
        if "partial" in path.name:
            raise OSError("disk gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk gone"), atomic_folder(output, overwrite=True) as folder:
        fill(folder, "new")
    assert is_complete(output, "earlier")
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(FileExistsError, match="already exists"), atomic_folder(output):
        output.mkdir()
    assert list(tmp_path.iterdir()) == [output]


def test_is_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "none", "x")
    fill(tmp_path, "x")
    assert is_complete(tmp_path, "x")
    assert not is_complete(tmp_path, "y")
    (tmp_path / "sub" / "x").write_text("longer")
    assert not is_complete(tmp_path, "x")
    (tmp_path / "sub" / "x").unlink()
    assert not is_complete(tmp_path, "x")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {}}', "\udc80"])
def test_a_foreign_record_is_not_complete(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD_FILE).write_text(content, errors="surrogateescape")
    assert not is_complete(tmp_path, "x")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert compute_sha256(tmp_path / "abc") == expected
