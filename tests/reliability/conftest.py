"""Counts of what was tried, printed at the end: ``make test-reliability``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

COUNTS: dict[str, int] = {}


@pytest.fixture
def summary() -> Iterator[dict[str, int]]:
    """What the tests tried, by name."""
    return COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each kind of trial."""
    if not COUNTS:
        return
    failed = len(terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", []))
    terminalreporter.section("reliability")
    for name, count in {**COUNTS, "failures": failed}.items():
        terminalreporter.write_line(f"{name:<48} {count:>6,}")
