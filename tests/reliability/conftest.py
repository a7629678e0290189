"""Counts of what was tried, printed at the end: ``make test-reliability``."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

KEY = "tried"


@pytest.fixture
def summary(record_property: Callable[[str, int], None]) -> Iterator[Counter[str]]:
    """What a test tried, by name; the reports carry it, whichever process the test ran in."""
    counts: Counter[str] = Counter()
    yield counts
    for name, count in counts.items():
        record_property(f"{KEY}/{name}", count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each kind of trial."""
    counts: Counter[str] = Counter()
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        if getattr(report, "when", None) == "teardown":
            for name, count in report.user_properties:
                kind, _, tried = str(name).partition("/")
                counts.update({tried: count} if kind == KEY else {})
    if not counts:
        return
    failed = len(terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", []))
    terminalreporter.section("reliability")
    for name, count in {**counts, "failures": failed}.items():
        terminalreporter.write_line(f"{name:<48} {count:>6,}")
