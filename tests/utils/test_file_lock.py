"""Files that several processes would make at once are made once."""

import fcntl
import subprocess
import sys
import threading
import time
from errno import EIO, ENOLCK, EOPNOTSUPP

import pytest

from bge_pruning.utils.files import lock_of


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
        "import sys, time; from pathlib import Path\n"
        "from bge_pruning.utils.files import lock_of\n"
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


def flock_fails(monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, "flock")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("number", [ENOLCK, EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_nobody_waits(number, wait, tmp_path, monkeypatch):
    flock_fails(monkeypatch, number)
    with lock_of(tmp_path / "x", wait=wait) as is_ours:
        assert is_ours
    assert not list(tmp_path.iterdir())


def test_what_else_goes_wrong_is_said_and_the_lock_of_another_is_left(tmp_path, monkeypatch):
    (tmp_path / "x.lock").touch()
    flock_fails(monkeypatch, EIO)
    with pytest.raises(OSError, match="flock"), lock_of(tmp_path / "x"):
        pytest.fail("is not ours")
    assert [file.name for file in tmp_path.iterdir()] == ["x.lock"]
