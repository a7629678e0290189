import logging

import pytest

from bge_pruning.utils import guard
from bge_pruning.utils.guard import warn_only


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_an_error_becomes_a_warning_with_its_reason_and_place(caplog):
    with caplog.at_level(logging.WARNING), warn_only("the report", "write it again"):
        raise RuntimeError("no font")
    (record,) = caplog.records
    assert record.getMessage() == (
        "the report failed, and the run goes on without it: RuntimeError: no font. "
        "To fix, write it again."
    )
    assert record.exc_info[0] is RuntimeError


def test_what_works_says_nothing(caplog):
    with warn_only("the report", "write it again"):
        pass
    assert caplog.records == []


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_an_interrupt_is_none_of_its_business():
    with pytest.raises(KeyboardInterrupt), warn_only("the report", "write it again"):
        raise KeyboardInterrupt


def test_tests_see_what_users_are_only_warned_of():
    with pytest.raises(AssertionError, match="no font"), warn_only("the report", "write it again"):
        raise RuntimeError("no font")
    assert guard.log.name == "bge_pruning.utils.guard"
