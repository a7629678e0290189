"""Processes of a run that wait for each other and hear of failures."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from bge_pruning.training import rank_watch
from bge_pruning.training.rank_watch import FAILURE, HEARD, RankWatch, rank_zero_first
from bge_pruning.utils.run_log import StoppedError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(monkeypatch):
    """The store of a run of two ranks."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "NODE_RANK": "0"}
    for name, value in {**here, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))

    return become


def wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def fail(error: Exception, before) -> None:
    """Fail in a watched run, after something has happened there."""

    def run() -> None:
        with RankWatch() as watch:
            before(watch)
            raise error

    with pytest.raises(type(error), match=re.escape(str(error))):
        run()


@pytest.mark.parametrize("listens", [True, False])
def test_rank_0_shows_the_error_of_another_rank_once(listens, store, as_rank, capsys):
    def before(watch):
        if not listens:
            watch._left.set()  # it fails at the same time
        store.set(FAILURE, "1 no space left")
        if listens:
            wait_for(lambda: store.check([HEARD]))

    as_rank(0)
    fail(RuntimeError("closed by peer"), before)  # which comes of it
    assert capsys.readouterr().err == "error (rank 1): no space left\n"
    assert store.get(FAILURE) == b"1 no space left"


def test_another_rank_tells_once_and_waits_to_be_heard(store, as_rank, capsys, monkeypatch):
    """The store may be gone the second time, and looking for it takes long."""
    connected, connect = [], rank_watch.connect
    monkeypatch.setattr(rank_watch, "HEARD_SECONDS", 0.3)
    monkeypatch.setattr(rank_watch, "connect", lambda *s: connected.append(s) or connect(*s))
    as_rank(1)
    begun = time.monotonic()
    fail(ValueError("no space left"), lambda watch: watch.tell(ValueError("no space left")))
    assert 0.3 < time.monotonic() - begun < 5
    assert connected == [(), (0.3,)]
    assert store.get(FAILURE) == b"1 no space left"
    assert capsys.readouterr().err == ""  # its own command shows it


def test_nothing_is_told_without_a_failure(store, as_rank):
    as_rank(1)
    with RankWatch():
        pass
    with pytest.raises(StoppedError), RankWatch():
        raise StoppedError("told to stop")
    with pytest.raises(KeyboardInterrupt), RankWatch():
        raise KeyboardInterrupt
    assert not store.check([FAILURE])


def test_another_node_hears_of_a_signal(store, as_rank, monkeypatch):
    """A launcher passes it on to its own ranks; those of the other would wait for ever."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(rank_watch, "HEARD_SECONDS", 0.3)
    as_rank(1)
    with pytest.raises(SystemExit), RankWatch():
        raise SystemExit(143)
    assert store.get(FAILURE) == b"1 stopped by SIGTERM"


def test_a_stage_is_watched_by_the_watch_of_its_pipeline(store, as_rank, capsys):
    as_rank(0)
    with RankWatch() as outer:
        with RankWatch() as inner:
            assert inner is outer
        store.set(FAILURE, "1 no space left")
        wait_for(lambda: store.check([HEARD]))
    assert capsys.readouterr().err == "error (rank 1): no space left\n"
    assert RankWatch.active is None


def test_a_run_of_one_process_has_no_store(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="alone"), RankWatch(), rank_zero_first():
        raise ValueError("alone")


def test_a_rank_ends_although_it_waits_for_ever(store, as_rank):
    """On a node whose launcher knows nothing of the failure."""
    as_rank(1)
    script = (
        "import time\nfrom bge_pruning.training import rank_watch\nrank_watch.GRACE_SECONDS = 0.1\n"
        "with rank_watch.RankWatch():\n    time.sleep(100)\n"
    )
    store.set(FAILURE, "0 no space left")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, timeout=60, capture_output=True)
    assert ended.returncode == 1 and b"Traceback" not in ended.stderr


def test_a_lost_store_is_not_looked_for_long_and_hides_no_failure(store, as_rank, monkeypatch):
    monkeypatch.setattr(rank_watch, "HEARD_SECONDS", 0.5)
    as_rank(1)
    begun = time.monotonic()
    fail(ValueError("own"), lambda watch: monkeypatch.setenv("MASTER_PORT", "1"))
    assert time.monotonic() - begun < 30


WAIT = """\
import datetime, sys, time
from torch import distributed
from bge_pruning.training.rank_watch import ask_rank_zero, connect, rank_zero_first
group = {"rank": int(sys.argv[1]), "world_size": 2, "timeout": datetime.timedelta(seconds=3)}
distributed.init_process_group("gloo", store=connect(), **group)
for number in range(2):
    with rank_zero_first():
        if sys.argv[1] == "0":
            time.sleep(0.5)
        print(sys.argv[1], "inside", time.time(), flush=True)
    print(sys.argv[1], "left", time.time(), flush=True)
print(sys.argv[1], ask_rank_zero(lambda: time.sleep(6) or "answer"), time.time(), flush=True)
distributed.barrier()
"""


@pytest.mark.parametrize("nodes", [False, True])
def test_the_first_rank_goes_first_and_nobody_leaves_early(nodes, store, as_rank, monkeypatch):
    """It may take longer than any collective operation."""
    processes = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1" if nodes else "2")
    for rank in (1, 0):
        as_rank(rank)
        if nodes:
            monkeypatch.setenv("NODE_RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", "0")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", WAIT, str(rank)]
        pipe = {"stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **pipe))
    lines = [process.communicate(timeout=60)[0].split() for process in processes]
    # The words of a line: who, what and when.
    one, zero = [list(zip(*[iter(words)] * 3, strict=True)) for words in lines]
    assert zero[4][1] == one[4][1] == "answer"
    for number in (0, 2):
        assert float(zero[number][2]) <= float(one[number][2])
        assert float(one[number][2]) <= min(float(zero[number + 1][2]), float(one[number + 1][2]))
