"""Files that several processes would make at once are made once."""

import subprocess
import sys
import threading
import time
from errno import ENOLCK

import filelock
import pytest

from bge_pruning.file_lock import lock_of


def test_a_file_is_made_by_one_at_a_time(tmp_path):
    path, made = tmp_path / "new" / "x.npy", []

    def make(number):
        with lock_of(path) as is_ours:
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


def test_one_that_failed_to_make_a_file_lets_others_try(tmp_path):
    with pytest.raises(OSError, match="disk"), lock_of(tmp_path / "x"):
        raise OSError("disk")
    assert not list(tmp_path.iterdir())
    with lock_of(tmp_path / "x", wait=False) as is_ours:
        assert is_ours
        assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]


def test_without_waiting_it_is_said_that_another_has_it(tmp_path):
    with lock_of(tmp_path / "x"):
        with lock_of(tmp_path / "x", wait=False) as is_ours:
            assert not is_ours
        with lock_of(tmp_path / "y", wait=False) as is_ours:
            assert is_ours


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from bge_pruning.file_lock import lock_of\n"
        "with lock_of(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        with lock_of(tmp_path / "x", wait=False) as is_ours:
            assert not is_ours
        process.kill()
    with lock_of(tmp_path / "x", wait=False) as is_ours:
        assert is_ours
    assert not list(tmp_path.iterdir())


def test_without_locks_on_the_file_system_nobody_waits(tmp_path, monkeypatch):
    def refuse(self):
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuse)
    with lock_of(tmp_path / "x", wait=False) as is_ours:
        assert is_ours
    assert not list(tmp_path.iterdir())
