"""Memory that the kernel counts, on blocks whose need is known."""

import mmap

import pytest

from bge_pruning.utils.process_memory import read_status, watch_memory

MIB = 2**20


def take(size: int) -> mmap.mmap:
    """New pages of the system, written once: ``malloc`` may hand out what was freed before."""
    pages = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        pages[start] = 1
    return pages


def test_what_is_taken_and_given_back_counts():
    with watch_memory() as peak:
        take(64 * MIB).close()
    # The kernel counts in steps of some pages.
    assert 63 * MIB <= peak.total < 80 * MIB
    assert peak.before <= read_status()["VmHWM"]


def test_what_was_taken_before_does_not_count():
    take(64 * MIB).close()
    kept = take(32 * MIB)
    with watch_memory() as peak:
        assert len(kept) == 32 * MIB
    assert peak.total < 8 * MIB
    assert peak.before > 32 * MIB


def test_pages_of_mapped_files_are_told_apart(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (MIB // 4))  # 64 MiB
    with path.open("rb") as file, watch_memory() as peak:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        mapped.close()
    assert peak.total >= 48 * MIB
    assert peak.anonymous < 16 * MIB


def test_a_failure_goes_through():
    with pytest.raises(ValueError, match="inside"), watch_memory() as peak:
        raise ValueError("inside")
    assert peak.before > 0
