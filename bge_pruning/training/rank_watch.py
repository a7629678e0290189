"""Let the processes of a run wait for each other, and end all of them when one fails.

They communicate through the key-value store that torch starts on rank 0. Unlike a collective
operation, waiting there has no time-out: what one rank does alone, from reading data to evaluating
a finished model, may take hours.
"""

from __future__ import annotations

import datetime
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, TypeVar

import torch.distributed
from torch.distributed import TCPStore

from bge_pruning.utils.run_log import SIGNALS, StoppedError, signal_of

T = TypeVar("T")
POLL_SECONDS = 0.2
# How long a failing rank waits to be heard, and how long the others then wait for their launcher to
# end them. Other nodes have their own launcher, which does not know of the failure.
HEARD_SECONDS = 3.0
GRACE_SECONDS = 15.0
FAILURE, HEARD = "bge_pruning/failure", "bge_pruning/heard"
EXIT_FAILURE = 1

_numbers = itertools.count()


def _setting(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def connect(seconds: float = 300.0) -> TCPStore | None:
    """Try so long to connect to the store of the run; ``None`` if there is only one process."""
    if _setting("WORLD_SIZE", 1) == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], _setting("MASTER_PORT", 0)
    timeout = datetime.timedelta(seconds=seconds)
    return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the body on rank 0 before the other ranks, which find the files it has written.

    After rank 0 comes the first rank of each other node, which finds the files too where nodes
    share a disk, and then the rest. So no rank writes a file that another one is writing.

    Every rank must enter equally often. No rank leaves before all have been inside, and rank 0,
    which has the store, leaves last; if one fails there, the others wait until they are ended, see
    :class:`RankWatch`.
    """
    number = next(_numbers)  # also in a single process, so that all ranks count alike
    store = connect()
    if store is None:
        yield
        return
    first = _setting("LOCAL_RANK", 0) == 0
    node = _setting("NODE_RANK", 0)
    written = [f"bge_pruning/written/{number}/{n}" for n in (0, node)]
    awaited = [] if first and node == 0 else written[:1] if first else written
    while awaited and not store.check(awaited):
        time.sleep(POLL_SECONDS)
    yield
    if first:
        store.set(written[1], "1")
    _count(store, f"bge_pruning/inside/{number}", waits=True)
    _count(store, f"bge_pruning/left/{number}", waits=_setting("RANK", 0) == 0)


def _count(store: TCPStore, key: str, waits: bool) -> None:
    store.add(key, 1)
    while waits and store.add(key, 0) < _setting("WORLD_SIZE", 1):
        time.sleep(POLL_SECONDS)


def on_rank_zero(action: Callable[[], object]) -> None:
    """Do something once; the other ranks wait as long as it takes."""
    with rank_zero_first():
        if _setting("RANK", 0) == 0:
            action()


def ask_rank_zero(question: Callable[[], T]) -> T:
    """Get rank 0's answer on every rank: what they do next must not depend on where they look."""
    answer: list[T] = []
    on_rank_zero(lambda: answer.append(question()))
    if _setting("WORLD_SIZE", 1) > 1:
        answer = answer or [None]
        torch.distributed.broadcast_object_list(answer)
    return answer[0]


def _concerns_others(error: BaseException) -> bool:
    if isinstance(error, Exception):
        return not isinstance(error, StoppedError)
    # A signal that no step of training agreed on: a launcher sends it to its own node's ranks.
    return _setting("LOCAL_WORLD_SIZE", 1) < _setting("WORLD_SIZE", 1)


class RankWatch:
    """Tells the other processes of a run why this one fails, and listens to them.

    A launcher shows what rank 0 writes, and ends the processes of its own node. So the first rank
    of every node writes the error of the failing rank to its standard error, and a process that
    was not ended a while later ends itself, whatever it is waiting for.

    It is a context manager: inside, it listens, and tells of exceptions that leave it, but not of
    :class:`StoppedError`, which all ranks raise. A watch inside another one is that one.
    """

    active: ClassVar[RankWatch | None] = None

    def __init__(self) -> None:
        self.rank = _setting("RANK", 0)
        self._left = threading.Event()
        self._written = threading.Lock()
        self._told = False
        self._listener: threading.Thread | None = None

    def __enter__(self) -> RankWatch:
        if RankWatch.active is not None:
            return RankWatch.active
        RankWatch.active = self
        if (store := connect()) is not None:
            arguments = {"target": self._listen, "args": (store,), "daemon": True}
            self._listener = threading.Thread(name="rank watch", **arguments)
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            RankWatch.active.tell(error)
        if RankWatch.active is self:
            RankWatch.active = None
            self._left.set()

    def tell(self, error: BaseException) -> None:
        """Tell why this rank fails, before it does anything that the others would notice.

        Only the first failure counts, which causes the later ones.
        """
        if self._listener is None or self._told or not _concerns_others(error):
            return
        self._told = True
        number = signal_of(error)
        message = f"{self.rank} {error if number is None else f'stopped by {SIGNALS[number]}'}"
        try:
            store = connect(HEARD_SECONDS)  # the listener may be in the middle of a question
            first = store.compare_set(FAILURE, "", message).decode()
            if first != message:
                self._write(store, first)
            elif self.rank or _setting("LOCAL_WORLD_SIZE", 1) < _setting("WORLD_SIZE", 1):
                end = time.monotonic() + HEARD_SECONDS
                while time.monotonic() < end and not store.check([HEARD]):
                    time.sleep(POLL_SECONDS)
        except (RuntimeError, OSError):
            return  # rank 0 is gone, and the store with it

    def _listen(self, store: TCPStore) -> None:
        try:
            while not store.check([FAILURE]):
                if self._left.wait(POLL_SECONDS):
                    return
            failure = store.get(FAILURE).decode()
            self._write(store, failure)
        except (RuntimeError, OSError):
            return  # as above: what waits for rank 0 finds out
        own = failure.split()[0] == str(self.rank)
        if not self._left.wait(GRACE_SECONDS) and not own:
            os._exit(EXIT_FAILURE)  # the main thread may wait for the other rank for ever

    def _write(self, store: TCPStore, failure: str) -> None:
        """Show another rank's error where the launcher shows it, once."""
        rank, message = failure.split(" ", maxsplit=1)
        shown = _setting("LOCAL_RANK", 0) == 0 and int(rank) != self.rank
        if shown and self._written.acquire(blocking=False):
            sys.stderr.write(f"error (rank {rank}): {message}\n")
            sys.stderr.flush()
            store.set(HEARD, "1")
