"""A small collection for evaluation."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from bge_pruning.evaluation.ranks import Ranks

WORDS = "the man woman dog cat child park plays reads eats rides guitar red book horse fast".split()


@pytest.fixture(scope="session")
def write_collection() -> Callable[..., Path]:
    """A function that writes a collection of ``count`` passages, a query for every second one."""

    def write(folder: Path, count: int = 30, seed: int = 1) -> Path:
        generator = np.random.default_rng(seed)
        (folder / "qrels").mkdir(parents=True)

        def sentence() -> str:
            return " ".join(generator.choice(WORDS, generator.integers(3, 9)))

        corpus = [{"_id": f"d{i}", "title": "", "text": sentence()} for i in range(count)]
        corpus[0]["title"] = "a title"
        queries = [
            {"_id": f"q{i}", "text": " ".join(corpus[i]["text"].split()[:3])}
            for i in range(0, count, 2)
        ]
        for name, rows in (("corpus", corpus), ("queries", queries)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)
        lines = [f"q{i}\td{i}\t1" for i in range(0, count, 2)] + ["q0\td1\t2", "q2\td3\t0"]
        header = "query-id\tcorpus-id\tscore"
        (folder / "qrels" / "test.tsv").write_text("\n".join([header, *lines]) + "\n")
        return folder

    return write


@pytest.fixture(scope="session")
def collection(tmp_path_factory, write_collection) -> Path:
    return write_collection(tmp_path_factory.mktemp("retrieval") / "tiny")


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
