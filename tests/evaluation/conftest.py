"""Several ranks in one process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from bge_pruning.evaluation.ranks import Ranks


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list]:
    """A function that does some work as several ranks, each a thread, and returns what each got."""

    def run(count: int, work: Callable[[Ranks], object]) -> list:
        barrier, slots = Barrier(count, timeout=60), [None] * count

        def of_rank(rank: int) -> object:
            def gather(part: object) -> list:
                slots[rank] = part
                barrier.wait()
                parts = list(slots)
                barrier.wait()
                return parts

            return work(Ranks(rank, count, gather))

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(of_rank, range(count)))

    return run
