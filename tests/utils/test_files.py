"""Files and folders are absent, complete, or what they were: never half-written or made twice."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from errno import EIO, ENOLCK, EOPNOTSUPP
from pathlib import Path

import pytest

from bge_pruning.utils import files

MARKER = "made-by-us.json"
NEW = {"model/sub/new.bin": "new"}
OLD = {"model/old.bin": "ten hours of work", f"model/{MARKER}": ""}


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "results" / "model"


@pytest.fixture
def old(output) -> Path:
    return make_old(output)


def make_old(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "old.bin").write_text("ten hours of work")
    (folder / MARKER).write_text("")
    return folder


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "new.bin").write_text("new")


def write(output: Path, overwrite: bool = False) -> None:
    with files.atomic_folder(output, MARKER, overwrite) as folder:
        fill(folder)


def tree(folder: Path) -> dict[str, str]:
    """Contents of all files by path; hidden ones and empty folders too."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def test_folder_appears_complete_and_alone(output):
    with files.atomic_folder(output, MARKER) as folder:
        assert not output.exists()
        assert folder.parent == output.parent  # a rename is one step only within a file system
        assert list(folder.iterdir()) == []
        fill(folder)
    assert tree(output.parent) == NEW


@pytest.mark.parametrize(
    "name", ["модель 模型 🐈", "with.dots.v1", ".hidden", "--flag", "a/b/model"]
)
def test_any_name_and_folders_above_are_made(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(name))
    assert tree(tmp_path) == {f"{name}/sub/new.bin": "new"}
    for overwrite in (False, True):  # an empty folder
        empty = tmp_path / f"empty-{overwrite}"
        empty.mkdir()
        write(empty, overwrite)
        assert tree(empty) == {"sub/new.bin": "new"}


def test_two_writers_do_not_share_a_folder(output):
    with files.atomic_folder(output, MARKER) as first:
        (first / "half.bin").write_text("half")
        write(output)
        assert tree(output) == {"sub/new.bin": "new"}
        (output / "sub" / "new.bin").unlink()
        (output / "sub").rmdir()  # free again for the first
    assert tree(output.parent) == {"model/half.bin": "half"}


@pytest.fixture(params=[True, False], ids=["swapped", "renamed twice"])
def swaps(request, monkeypatch) -> bool:
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


def test_the_old_folder_is_there_until_it_is_replaced_whichever_way(swaps, old):
    with files.atomic_folder(old, MARKER, overwrite=True) as folder:
        assert tree(old.parent) == {**OLD, folder.name: "folder"}
        fill(folder)
    assert tree(old.parent) == NEW


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
    with files.atomic_folder(output, MARKER) as folder:
        fill(folder)
        (folder / "link").symlink_to("nowhere")
    assert sorted(done[:3]) == sorted([folder.name, "sub", "new.bin"])
    assert done[3:] == ["renamed", output.parent.name]


@pytest.mark.parametrize("link_to", ["folder", "nothing"])
def test_output_may_be_a_link(link_to, swaps, output, tmp_path):
    target = tmp_path / "big-disk"
    if link_to == "folder":
        make_old(target)
    output.parent.mkdir()
    output.symlink_to(target, target_is_directory=True)
    write(output, overwrite=True)
    assert tree(output) == {"sub/new.bin": "new"}
    assert os.listdir(output.parent) == ["model"]
    assert list(tmp_path.rglob(".*")) == []
    # What the link pointed to is not ours to delete.
    assert (target / "old.bin").exists() == (link_to == "folder")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_leaves_things_as_they_were(error, exists, output, tmp_path):
    (tmp_path / "mine").mkdir()
    place = make_old(output) if exists else tmp_path / "mine" / "a" / "b" / "model"
    before = tree(tmp_path)

    def fail():
        with files.atomic_folder(place, MARKER, overwrite=True) as folder:
            (folder / "half.bin").write_text("half")
            raise error("half-way")

    with pytest.raises(error, match="half-way"):
        fail()
    assert tree(tmp_path) == before  # also without the folders above


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", [1, 2], ids=["old one aside", "new one in place"])
@pytest.mark.parametrize("exists", [False, True])
def test_failed_rename_leaves_the_old_folder(exists, failing, error, output, monkeypatch):
    rename, calls = Path.rename, []

    def fail(self, target):
        calls.append(self)
        if len(calls) == failing or not exists:
            raise error("not now")
        return rename(self, target)

    if exists:
        make_old(output)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(error, match="not now"):
        write(output, overwrite=True)
    assert len(calls) >= failing or not exists
    assert tree(output.parent) == (OLD if exists else {})


def refuse(output: Path, error: type[Exception], message: str, overwrite: bool = False) -> None:
    with pytest.raises(error, match=message), files.atomic_folder(output, MARKER, overwrite):
        pytest.fail("the body must not run")


def test_used_folder_is_refused_before_anything_is_written(old):
    message = f"{old} exists and is kept. To fix, choose another folder, or pass --overwrite."
    refuse(old, FileExistsError, re.escape(message))
    assert tree(old.parent) == OLD
    (old / MARKER).unlink()
    message = f"{old} holds no {MARKER}, so it is not a folder of this kind and is kept"
    refuse(old, FileExistsError, re.escape(message) + ".*To fix, choose another", overwrite=True)
    assert tree(old.parent) == {"model/old.bin": "ten hours of work"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    message = r"file is a file\. To fix, choose a folder that does not exist\."
    refuse(file, FileExistsError, message, overwrite)
    for name in ("file/model", "file/a/model"):
        message = rf"{name}: no folder can be made there \(.+\)\. To fix, choose a place"
        refuse(tmp_path / name, OSError, message, overwrite)
    assert tree(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("place", [".", "..", "/", "here", "sub/.."])
def test_places_that_cannot_be_renamed(place, tmp_path, monkeypatch):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    output = tmp_path / "here" if place == "here" else Path(place)
    inside = re.escape(str(output / "model"))
    message = rf"is the working folder or a disk .* To fix, choose a folder inside it, .*{inside}\."
    refuse(output, ValueError, message)
    assert tree(tmp_path) == {"here/sub": "folder"}
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "sub")
    refuse(tmp_path / "here" / "sub", ValueError, "a disk of its own")  # a volume


def test_folder_that_another_process_made_meanwhile_is_kept(output):
    def write_beside_another():
        with files.atomic_folder(output, MARKER) as folder:
            (folder / "new.bin").write_text("new")
            make_old(output)

    with pytest.raises(OSError, match="model"):
        write_beside_another()
    assert tree(output.parent) == OLD


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
            make_old(output)
        before = tree(output)
        if not killed_at(step, output, swaps):
            break
        after = tree(output)
        allowed = [before, {"sub/new.bin": "new"}, {}]
        assert after in (allowed if not exists else allowed[: 2 + (not swaps)])
        found.add(tuple(after))
        files.clean_up(output)
        names = os.listdir(output.parent) if output.parent.exists() else []
        assert names in ([], ["model"])
        assert tree(output) in (allowed if not exists else allowed[:2])
        if tree(output) == {"sub/new.bin": "new"}:
            files._remove(output)
        step += 1
    assert step > 8 and ("sub/new.bin",) in found
    assert tree(output.parent) == NEW


def test_left_overs_are_removed_or_come_back(old):
    partial = old.with_name(".model.partial-0123abcd")
    partial.mkdir()
    (partial / "half.bin").write_text("half")
    old.with_name(".model.partial-1123abcd").symlink_to("nowhere")
    old.with_name(".model.replaced-2123abcd").mkdir()
    files.clean_up(old)
    assert tree(old.parent) == OLD
    # What was put aside comes back.
    old.rename(old.with_name(".model.replaced-0123abcd"))
    with pytest.raises(FileExistsError, match="model exists and is kept"):
        write(old)
    assert tree(old.parent) == OLD


def test_what_a_living_process_writes_is_left_alone(output):
    with files.atomic_folder(output, MARKER) as first:
        aside = first.with_name(first.name.replace("partial", "replaced"))
        aside.mkdir()  # as where names cannot be swapped
        files.clean_up(output)
        assert first.is_dir() and aside.is_dir() and not output.exists()
        aside.rmdir()
        (first / "new.bin").write_text("new")
    assert tree(output.parent) == {"model/new.bin": "new"}


def test_other_names_are_not_ours(output):
    names = {".model.partial-0123abcX", ".model.partial-0123abcde", "model.partial-0123abcd"}
    names |= {".models.partial-0123abcd", ".mode1.replaced-0123abcd"}
    for name in (names := names | {".model.partial-x.replaced-0123abcd"}):
        output.with_name(name).mkdir(parents=True)
    files.clean_up(output)
    assert set(os.listdir(output.parent)) == names


def flock_fails(monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, "flock")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_system_without_locks(output, monkeypatch):
    stale = output.with_name(".model.partial-0123abcd")
    stale.mkdir(parents=True)
    flock_fails(monkeypatch, EOPNOTSUPP)
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


def test_a_file_is_made_by_one_at_a_time(tmp_path):
    path, made = tmp_path / "new" / "x.npy", []

    def make(number):
        with files.lock_of(path) as is_ours:
            assert is_ours
            if not path.is_file():
                made.append(number)
                time.sleep(0.05)
                path.write_bytes(b"x")

    threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [file.name for file in path.parent.iterdir()] == ["x.npy"]


def test_the_lock_of_one_that_failed_or_was_killed_is_free(tmp_path):
    with pytest.raises(OSError, match="disk"), files.lock_of(tmp_path / "x"):
        raise OSError("disk")
    assert not list(tmp_path.iterdir())
    with files.lock_of(tmp_path / "x", wait=False) as is_ours:
        assert is_ours
        assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]
    program = (
        "import sys, time; from pathlib import Path\n"
        "from bge_pruning.utils.files import lock_of\n"
        "with lock_of(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with files.lock_of(tmp_path / "x", wait=False) as is_ours:
            assert not is_ours
        with files.lock_of(tmp_path / "y", wait=False) as is_ours:
            assert is_ours
        process.kill()
    with files.lock_of(tmp_path / "x", wait=False) as is_ours:
        assert is_ours
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [ENOLCK, EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_nobody_waits(number, tmp_path, monkeypatch):
    flock_fails(monkeypatch, number)
    for wait in (True, False):
        with files.lock_of(tmp_path / "x", wait=wait) as is_ours:
            assert is_ours
        assert not list(tmp_path.iterdir())


def test_what_else_goes_wrong_is_said_and_the_lock_of_another_is_left(tmp_path, monkeypatch):
    (tmp_path / "x.lock").touch()
    flock_fails(monkeypatch, EIO)
    with pytest.raises(OSError, match="flock"), files.lock_of(tmp_path / "x"):
        pytest.fail("is not ours")
    assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]


def test_an_existing_file_is_kept_also_where_a_text_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    files.write_json({"value": 1}, path)
    with pytest.raises(FileExistsError, match=r"results\.json exists.*--overwrite"):
        files.write_json({"value": 2}, path)
    assert json.loads(path.read_text()) == {"value": 1}
    files.write_json({"текст": "天气"}, path, overwrite=True)
    assert path.read_bytes().decode("utf-8") == '{\n  "текст": "天气"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json({"value": float("nan")}, path, overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    files.write_text(tmp_path / "a.txt", "first")

    def fill_the_disk(path, text, **_):
        with path.open("w") as stream:
            stream.write(text[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"


def test_what_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "b").touch()
    with pytest.raises(FileExistsError, match="b exists. To fix, choose another name or pass"):
        files.refuse_existing([tmp_path / "a", tmp_path / "b"], overwrite=False)
    files.refuse_existing([tmp_path / "a", tmp_path / "b"], overwrite=True)
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder. To fix, name a file"):
        files.refuse_existing([tmp_path], overwrite=True)
    message = "b.json cannot be written: .*/b is not a folder that may be written to. To fix"
    with pytest.raises(PermissionError, match=message):
        files.refuse_existing([tmp_path / "b" / "a" / "b.json"], overwrite=False)
    files.refuse_existing([tmp_path / "new" / "a" / "b.json"], overwrite=False)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="a.json cannot be written: .* To fix, choose ano"):
        files.refuse_existing([tmp_path / "a.json"], overwrite=False)


def test_the_table_of_an_evaluation_has_another_name():
    assert files.evaluation_files("a/b.json") == (Path("a/b.json"), Path("a/b.md"))
    assert files.evaluation_files("a/b") == (Path("a/b"), Path("a/b.md"))
    with pytest.raises(ValueError, match=r"b\.md is to hold JSON, .* To fix, write a/b\.json"):
        files.evaluation_files("a/b.md")
    with pytest.raises(ValueError, match="'.' names no file. To fix, write e.g. evaluation.json"):
        files.evaluation_files("")
