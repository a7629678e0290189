"""Output folders are absent, complete, or what they were before: never half-written."""

import os
import re
from pathlib import Path

import pytest

from bge_pruning.atomic_folder import atomic_folder

MARKER = "made-by-us.json"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "results" / "model"


@pytest.fixture
def old(output) -> Path:
    """The output folder, which holds an earlier result."""
    output.mkdir(parents=True)
    (output / "old.bin").write_text("ten hours of work")
    (output / MARKER).write_text("")
    return output


def write(output: Path, overwrite: bool = False) -> None:
    with atomic_folder(output, MARKER, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "new.bin").write_text("new")


def tree(folder: Path) -> dict[str, str]:
    """Contents of all files by path; hidden ones and empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


NEW = {"model/sub/new.bin": "new"}
OLD = {"model/old.bin": "ten hours of work", f"model/{MARKER}": ""}


def test_folder_appears_complete_and_alone(output):
    write(output)
    assert tree(output.parent) == NEW


def test_folder_is_not_there_while_it_is_written(output):
    with atomic_folder(output, MARKER) as folder:
        assert not output.exists()
        # A rename is one step only within a file system.
        assert folder.parent == output.parent
        assert list(folder.iterdir()) == []


def test_old_folder_is_there_while_the_new_one_is_written(old):
    with atomic_folder(old, MARKER, overwrite=True) as folder:
        assert tree(old.parent) == {**OLD, f"{folder.name}": "folder"}
        (folder / "sub").mkdir()
        (folder / "sub" / "new.bin").write_text("new")
    assert tree(old.parent) == NEW


@pytest.mark.parametrize("overwrite", [False, True])
def test_empty_folder_may_be_written_to(overwrite, output):
    output.mkdir(parents=True)
    write(output, overwrite)
    assert tree(output.parent) == NEW


@pytest.mark.parametrize("name", ["модель 模型 🐈", "with.dots.v1", ".hidden", "--flag"])
def test_any_name(name, tmp_path):
    write(tmp_path / name)
    assert tree(tmp_path) == {f"{name}/sub/new.bin": "new"}


def test_folders_above_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "model")
    assert tree(tmp_path) == {"a/b/model/sub/new.bin": "new"}


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("model"))
    assert tree(tmp_path) == NEW


def test_two_writers_do_not_share_a_folder(output):
    with atomic_folder(output, MARKER) as first:
        (first / "half.bin").write_text("half")
        write(output)
        assert tree(output) == {"sub/new.bin": "new"}
        (output / "sub" / "new.bin").unlink()
        (output / "sub").rmdir()  # free again for the first
    assert tree(output.parent) == {"model/half.bin": "half"}


@pytest.mark.parametrize("link_to", ["folder", "nothing"])
def test_output_may_be_a_link(link_to, output, tmp_path):
    target = tmp_path / "big-disk"
    if link_to == "folder":
        target.mkdir()
        (target / "old.bin").write_text("old")
        (target / MARKER).write_text("")
    output.parent.mkdir()
    output.symlink_to(target, target_is_directory=True)
    write(output, overwrite=True)
    assert tree(output) == {"sub/new.bin": "new"}
    assert os.listdir(output.parent) == ["model"]
    assert list(tmp_path.rglob(".*")) == []
    # What the link pointed to is not ours to delete.
    assert (target / "old.bin").exists() == (link_to == "folder")


# Failures


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_things_as_they_were(error, exists, output, request):
    if exists:
        request.getfixturevalue("old")

    def fail():
        with atomic_folder(output, MARKER, overwrite=True) as folder:
            (folder / "half.bin").write_text("half")
            raise error("half-way")

    with pytest.raises(error, match="half-way"):
        fail()
    assert tree(output.parent) == (OLD if exists else {})


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2], ids=["old one aside", "new one in place"])
def test_failed_rename_leaves_the_old_folder(failing, error, old, monkeypatch):
    rename, calls = Path.rename, []

    def fail(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise error("not now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error, match="not now"):
        write(old, overwrite=True)
    assert len(calls) >= failing
    assert tree(old.parent) == OLD


def test_failed_rename_of_a_first_folder_leaves_nothing(output, monkeypatch):
    def fail(self, target):
        raise OSError("not now")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="not now"):
        write(output)
    assert tree(output.parent) == {}


# Refusals


def test_used_folder_is_refused_before_anything_is_written(old):
    message = f"{old} exists and is kept. To fix, choose another folder, or pass --overwrite."
    with pytest.raises(FileExistsError, match=re.escape(message)), atomic_folder(old, MARKER):
        pytest.fail("the body must not run")
    assert tree(old.parent) == OLD


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite, output):
    message = r"model is a file\. To fix, choose a folder that does not exist\."
    output.parent.mkdir()
    output.write_text("mine")
    with pytest.raises(FileExistsError, match=message), atomic_folder(output, MARKER, overwrite):
        pytest.fail("the body must not run")
    assert tree(output.parent) == {"model": "mine"}


def test_a_folder_of_another_kind_is_never_replaced(old):
    (old / MARKER).unlink()
    message = f"{old} holds no {MARKER}, so it is nothing of this kind and is kept"
    with (
        pytest.raises(FileExistsError, match=re.escape(message) + ".*To fix, choose another"),
        atomic_folder(old, MARKER, overwrite=True),
    ):
        pytest.fail("the body must not run")
    assert tree(old.parent) == {"model/old.bin": "ten hours of work"}


def test_folder_that_another_process_made_meanwhile_is_kept(output):
    def write_beside_another():
        with atomic_folder(output, MARKER) as folder:
            (folder / "new.bin").write_text("new")
            output.mkdir()
            (output / "old.bin").write_text("ten hours of work")
            (output / MARKER).write_text("")

    with pytest.raises(OSError, match="model"):
        write_beside_another()
    assert tree(output.parent) == OLD
