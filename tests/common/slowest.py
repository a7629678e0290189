"""The ten slowest tests, and a limit for those of the default run.

What is limited is the smaller of a call's elapsed time and its processor time (children
included): a busy machine stretches the first, several processes add up in the second. Fixtures
are shown apart and are not limited: who pays for one that is shared is a matter of luck.
"""

import os
import resource
import time
from collections.abc import Iterator

import pytest

LIMIT = float(os.environ.get("TEST_SECONDS", "15"))
UNLIMITED = ("slow", "gpu", "reliability", "benchmark")
KEY = "seconds"


def _processor_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _measured(item: pytest.Item, phase: str) -> Iterator[None]:
    began, used = time.perf_counter(), _processor_seconds()
    result = yield
    seconds = min(time.perf_counter() - began, _processor_seconds() - used)
    item.user_properties.append((f"{KEY}/{phase}", round(seconds, 3)))
    limited = phase == "call" and not any(map(item.get_closest_marker, UNLIMITED))
    if limited and seconds > LIMIT:
        pytest.fail(
            f"took {seconds:.1f} s, more than the {LIMIT:g} s of a test of the default run. To "
            "fix, make it cheaper, or mark it slow. TEST_SECONDS sets another limit.",
            pytrace=False,
        )
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _measured(item, "call"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The ten slowest calls and the three slowest preparations, whichever process ran them."""
    found: dict[str, dict[str, float]] = {"call": {}, "setup": {}}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, seconds in getattr(report, "user_properties", ()):
                kind, _, phase = str(name).partition("/")
                if kind == KEY:
                    found[phase][report.nodeid] = seconds
    if not any(found.values()):
        return
    terminalreporter.section("slowest (seconds of elapsed or processor time, the smaller)")
    for phase, count in (("call", 10), ("setup", 3)):
        ranked = sorted(found[phase].items(), key=lambda pair: -pair[1])
        for test, seconds in ranked[:count]:
            terminalreporter.write_line(f"{seconds:7.1f} {phase:<5} {test}")
