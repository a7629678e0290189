"""The log file of a run: complete, appended to, with the ranks' warnings and the end."""

import logging
import re

import pytest
from huggingface_hub import constants

from bge_pruning.utils.run_log import FILE_ONLY, RunLog, log_hub

log = logging.getLogger("bge_pruning.x")
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture(autouse=True)
def package_logger():
    """The package's logger as a new process has it, put back at the end."""
    logger = logging.getLogger("bge_pruning")
    before = logger.level, logger.propagate
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    yield logger
    logger.setLevel(before[0])
    logger.propagate = before[1]


def test_what_came_before_the_folder_is_in_the_file(tmp_path, package_logger):
    path = tmp_path / "train.log"
    with RunLog(0) as run_log:
        log.info("the plan")
        assert not path.exists()
        run_log.open(path)
        log.warning("careful")
        log.info("step 1", extra={FILE_ONLY: True})
        log.debug("nothing for a person")
        lines = path.read_text().splitlines()
    assert [re.sub(STAMP, "T", line) for line in lines] == [
        "T INFO the plan",
        "T WARNING careful",
        "T INFO step 1",
    ]
    log.info("after it")
    assert path.read_text().splitlines() == lines
    assert package_logger.level == logging.NOTSET
    assert not any(isinstance(h, RunLog) for h in package_logger.handlers)


def test_a_second_start_appends(tmp_path, package_logger):
    for number in (1, 2):
        with RunLog(0) as run_log:
            run_log.open(tmp_path / "train.log")
            log.info("start %d", number)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[-7:] for line in lines] == ["start 1", "start 2"]
    package_logger.setLevel(logging.DEBUG)  # already says more
    with RunLog(0):
        log.info("refused before there is a folder")
        assert package_logger.level == logging.DEBUG
    assert package_logger.level == logging.DEBUG
    assert (tmp_path / "train.log").read_text().splitlines() == lines


def test_other_ranks_add_their_warnings(tmp_path):
    with RunLog(3) as run_log:
        run_log.open(tmp_path / "train.log")
        log.info("as the first rank says it")
        log.warning("careful")
    assert re.fullmatch(rf"{STAMP} WARNING rank 3: careful\n", (tmp_path / "train.log").read_text())


@pytest.mark.parametrize(
    ("error", "place"), [(ValueError("bad file"), False), (KeyError("a bug"), True)]
)
def test_the_error_that_ended_the_run_is_in_the_file_alone(error, place, tmp_path, caplog):
    path = tmp_path / "train.log"

    def run() -> None:
        with RunLog(0) as run_log:
            run_log.open(path)
            raise error

    with pytest.raises(type(error)):
        run()
    text = path.read_text()
    assert f"ERROR ended by {type(error).__name__}: {error}" in text
    assert ("Traceback" in text) is place
    (record,) = [r for r in caplog.records if "ended by" in r.getMessage()]
    assert getattr(record, FILE_ONLY)


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with RunLog(0) as run_log:
        run_log.open(tmp_path / "train.log")
        run_log.path = tmp_path / "gone" / "train.log"
        log.info("lost for now")
        run_log.path = tmp_path / "train.log"
        log.info("there again")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" INFO ")[1] for line in lines] == ["lost for now", "there again"]


def test_the_hub_is_named_once_before_it_is_asked(monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with caplog.at_level(logging.INFO, "bge_pruning"):
        for name in ("owner/model", "owner/model", "owner/other"):
            log_hub(name)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        log_hub("owner/third")
    names = ("owner/model", "owner/other")
    assert caplog.messages == [f"contacting the hub for {name}" for name in names]
