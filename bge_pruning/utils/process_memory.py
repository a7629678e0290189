"""Memory of this process as the Linux kernel counts it: libraries and mapped files too."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
INTERVAL = 0.005  # seconds between two samples


@dataclass
class PeakMemory:
    """The most that a block took above what the process had before it, in bytes.

    Attributes:
        before: Resident bytes when the block began.
        total: Resident bytes on top of that, pages of mapped files included. The system may take
            such pages back at any time.
        anonymous: The part that is no mapped file, by samples: a peak that lasts less than
            ``INTERVAL`` may be missed.
    """

    before: int = 0
    total: int = 0
    anonymous: int = 0


def read_status() -> dict[str, int]:
    """Bytes by the names of ``/proc/self/status``, such as ``VmHWM``, ``VmRSS``, ``RssAnon``."""
    rows = (line.split() for line in STATUS.read_text().splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if row[-1] == "kB"}


@contextmanager
def watch_memory() -> Iterator[PeakMemory]:
    """Measure the block; what is yielded holds the numbers when it has ended.

    Raises:
        OSError: If the system does not count, or does not let a process begin a new count.
    """
    gc.collect()
    CLEAR.write_text("5")  # VmHWM starts again from what there is now
    before, peak = read_status(), PeakMemory()
    peak.before = before["VmRSS"]
    ended = threading.Event()
    largest = [before["RssAnon"]]

    def sample() -> None:
        while not ended.wait(INTERVAL):
            largest[0] = max(largest[0], read_status()["RssAnon"])

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
        peak.total = read_status()["VmHWM"] - before["VmRSS"]
        peak.anonymous = largest[0] - before["RssAnon"]
