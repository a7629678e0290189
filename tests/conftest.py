"""Hooks of every test; the fixtures are in ``tests/common``."""

import gc
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Before torch is imported: tensors are tiny here, and threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = [
    "tests.common.data",
    "tests.common.hub",
    "tests.common.models",
    "tests.common.pictures",
    "tests.common.trainings",
    "tests.common.runs",
    "tests.common.slowest",
]

settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=300, deadline=None)
settings.load_profile("ci")


class _Raise(logging.Handler):
    """Turns a warning into an error."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


GUARD = logging.getLogger("bge_pruning.utils.guard")
RAISE = _Raise(level=logging.WARNING)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, compilers and communication warn of their own parts: no error of this project."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """An evaluation collects garbage: among its own objects, not those of imported libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def no_hidden_failures() -> Iterator[None]:
    """What may fail without ending a run (reports, pictures, uploads) fails the test."""
    GUARD.addHandler(RAISE)
    yield
    GUARD.removeHandler(RAISE)


@pytest.fixture
def failures_may_be_hidden() -> Iterator[None]:
    """This test looks at how such a failure is reported."""
    GUARD.removeHandler(RAISE)
    yield
    GUARD.addHandler(RAISE)


@pytest.fixture
def messages(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """What the package logs, even after a command line has set its logger up for a terminal."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)
    return caplog
