"""Output folders are absent, complete, or what they were before: never half-written."""

import ctypes
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bge_pruning.utils import files as atomic_folder_module
from bge_pruning.utils.files import atomic_folder, clean_up

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


@pytest.fixture(params=[True, False], ids=["swapped", "renamed twice"])
def swaps(request, monkeypatch) -> bool:
    """Whether the system can swap two names in one step."""
    if not request.param:
        monkeypatch.setattr(atomic_folder_module, "_exchange", lambda *_: False)
    return request.param


def test_the_old_folder_is_replaced_whichever_way(swaps, old):
    write(old, overwrite=True)
    assert tree(old.parent) == NEW


def test_this_system_can_swap_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    assert atomic_folder_module._exchange(tmp_path / "a", tmp_path / "b")
    assert tree(tmp_path) == {"a/name": "b", "b/name": "a"}
    assert not atomic_folder_module._exchange(tmp_path / "a", tmp_path / "none")


def test_a_system_without_the_call(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not atomic_folder_module._exchange(tmp_path, tmp_path)


def test_everything_is_on_the_disk_before_it_is_in_place(output, monkeypatch):
    done, flush, rename = [], os.fsync, Path.rename

    def record(handle):
        done.append(os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2])
        flush(handle)

    def record_rename(self, target):
        done.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", record_rename)
    with atomic_folder(output, MARKER) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "new.bin").write_text("new")
        (folder / "link").symlink_to("nowhere")
        name = folder.name
    assert sorted(done[:3]) == sorted([name, "sub", "new.bin"])
    assert done[3:] == ["renamed", output.parent.name]


@pytest.mark.parametrize("link_to", ["folder", "nothing"])
def test_output_may_be_a_link(link_to, swaps, output, tmp_path):
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


def test_failure_leaves_no_folders_above(tmp_path):
    (tmp_path / "mine").mkdir()

    def fail():
        with atomic_folder(tmp_path / "mine" / "a" / "b" / "model", MARKER):
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        fail()
    assert tree(tmp_path) == {"mine": "folder"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2], ids=["old one aside", "new one in place"])
def test_failed_rename_leaves_the_old_folder(failing, error, old, monkeypatch):
    rename, calls = Path.rename, []

    def fail(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise error("not now")
        return rename(self, target)

    monkeypatch.setattr(atomic_folder_module, "_exchange", lambda *_: False)
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


@pytest.mark.parametrize("place", [".", "..", "/", "here", "sub/.."])
def test_places_that_cannot_be_renamed(place, tmp_path, monkeypatch):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    output = tmp_path / "here" if place == "here" else Path(place)
    inside = re.escape(str(output / "model"))
    message = rf"is the working folder or a disk .* To fix, choose a folder inside it, .*{inside}\."
    with pytest.raises(ValueError, match=message), atomic_folder(output, MARKER):
        pytest.fail("the body must not run")
    assert tree(tmp_path) == {"here/sub": "folder"}


def test_a_volume_is_refused_before_the_work(output, monkeypatch):
    output.mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    with pytest.raises(ValueError, match="a disk of its own"), atomic_folder(output, MARKER):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("name", ["file/model", "file/a/model"])
def test_a_place_without_folders(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = rf"{name}: no folder can be made there \(.+\)\. To fix, choose a place"
    with pytest.raises(OSError, match=message), atomic_folder(tmp_path / name, MARKER):
        pytest.fail("the body must not run")
    assert tree(tmp_path) == {"file": "mine"}


def test_a_folder_of_another_kind_is_never_replaced(old):
    (old / MARKER).unlink()
    message = f"{old} holds no {MARKER}, so it is not a folder of this kind and is kept"
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


# Killed


# Writes the folder in argv[1], and kills itself before step argv[2] of what it does to files.
KILLED = """
import os, signal, sys
from pathlib import Path
from bge_pruning.utils import files as module

output, last, swaps = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
steps = 0

def count(event, arguments):
    global steps
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        if str(output.parent) in str(arguments) or event in ("os.remove", "os.rmdir"):
            steps += 1
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)

if not swaps:
    module._exchange = lambda *_: False
sys.addaudithook(count)
with module.atomic_folder(output, "made-by-us.json", overwrite=True) as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "new.bin").write_text("new")
"""


def killed_at(step: int, output: Path, swaps: bool) -> bool:
    """Whether a process that writes the folder got as far as that step, and was killed there."""
    command = [sys.executable, "-c", KILLED, str(output), str(step), str(swaps)]
    code = subprocess.run(command, cwd=Path(__file__).parents[2], check=False).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("exists", [False, True], ids=["first", "again"])
def test_killed_at_any_step_the_folder_is_absent_or_complete(exists, swaps, output):
    step, found = 1, set()
    while True:
        if exists and not output.exists():
            output.mkdir(parents=True)
            (output / "old.bin").write_text("ten hours of work")
            (output / MARKER).write_text("")
        before = tree(output)
        if not killed_at(step, output, swaps):
            break
        after = tree(output)
        allowed = [before, {"sub/new.bin": "new"}, {}]
        assert after in (allowed if not exists else allowed[: 2 + (not swaps)])
        found.add(tuple(after))
        clean_up(output)
        names = os.listdir(output.parent) if output.parent.exists() else []
        assert names in ([], ["model"])
        assert tree(output) in (allowed if not exists else allowed[:2])
        if tree(output) == {"sub/new.bin": "new"}:
            atomic_folder_module._remove(output)
        step += 1
    assert step > 8 and ("sub/new.bin",) in found
    assert tree(output.parent) == NEW


def test_left_overs_are_removed_by_the_next_writer(old):
    partial = old.with_name(".model.partial-0123abcd")
    partial.mkdir()
    (partial / "half.bin").write_text("half")
    old.with_name(".model.partial-1123abcd").symlink_to("nowhere")
    replaced = old.with_name(".model.replaced-2123abcd")
    replaced.mkdir()
    write(old, overwrite=True)
    assert tree(old.parent) == NEW


def test_what_was_put_aside_comes_back(old):
    old.rename(old.with_name(".model.replaced-0123abcd"))
    with pytest.raises(FileExistsError, match="model exists and is kept"):
        write(old)
    assert tree(old.parent) == OLD


def test_what_a_living_process_writes_is_left_alone(output):
    with atomic_folder(output, MARKER) as first:
        aside = first.with_name(first.name.replace("partial", "replaced"))
        aside.mkdir()  # as where names cannot be swapped
        clean_up(output)
        assert first.is_dir() and aside.is_dir() and not output.exists()
        aside.rmdir()
        (first / "new.bin").write_text("new")
    assert tree(output.parent) == {"model/new.bin": "new"}


@pytest.mark.parametrize(
    "name",
    [
        ".model.partial-0123abcX",
        ".model.partial-0123abcde",
        "model.partial-0123abcd",
        ".models.partial-0123abcd",
        ".model.partial-x.replaced-0123abcd",
        ".mode1.replaced-0123abcd",
    ],
)
def test_other_names_are_not_ours(name, output):
    other = output.with_name(name)
    other.mkdir(parents=True)
    clean_up(output)
    assert os.listdir(output.parent) == [name]


def test_a_file_system_without_locks(output, monkeypatch):
    stale = output.with_name(".model.partial-0123abcd")
    stale.mkdir(parents=True)

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(output)
    # Its process may be alive.
    assert tree(output.parent) == {**NEW, stale.name: "folder"}


def test_a_folder_that_is_taken_for_a_left_over_is_made_anew(output, monkeypatch):
    lock, calls = fcntl.flock, []

    def flock(handle, operation):
        calls.append(handle)
        if len(calls) == 1:  # another process cleans up before the folder is locked
            raise BlockingIOError
        if len(calls) == 2:
            os.rmdir(os.readlink(f"/proc/self/fd/{handle}"))
        lock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    write(output)
    assert len(calls) == 3
    assert tree(output) == {"sub/new.bin": "new"}
