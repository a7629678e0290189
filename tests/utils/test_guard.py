"""What becomes of an error, and what a command says."""

import io
import logging
import sys

import pytest

from bge_pruning.config.schema import ConfigError
from bge_pruning.utils import guard
from bge_pruning.utils.guard import (
    EXIT_FAILURE,
    EXIT_USAGE,
    import_optional,
    run_command,
    setup_logging,
    warn_only,
)
from bge_pruning.utils.run_log import FILE_ONLY


@pytest.fixture(autouse=True)
def package_logger(monkeypatch):
    """The package's logger as a new process has it, put back at the end."""
    for name in ("RANK", "BGE_PRUNING_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("bge_pruning")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


# Exit codes and messages


def failing(error: BaseException):
    def command():
        raise error

    return command


def test_success(capsys):
    done = []
    assert run_command(lambda: done.append(1)) == 0
    assert done == [1]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("seed -1 is not 0 or more."), EXIT_USAGE, "seed -1 is not 0 or more."),
        (ValueError("bad file"), EXIT_FAILURE, "bad file"),
        (FileNotFoundError("a.csv: no such file"), EXIT_FAILURE, "a.csv: no such file"),
        (
            FileNotFoundError(2, "No such file", "a.csv"),
            EXIT_FAILURE,
            "a.csv: No such file. To fix, check the path.",
        ),
        (
            OSError(28, "No space left on device", "a.pt"),
            EXIT_FAILURE,
            "a.pt: No space left on device. To fix, free space on its disk, or choose a folder on "
            "another one, and run the command again.",
        ),
        (
            OSError(27, "File too large"),
            EXIT_FAILURE,
            "File too large. To fix, free space on its disk, or choose a folder on another one, "
            "and run the command again.",
        ),
        (
            PermissionError(13, "Permission denied", "runs"),
            EXIT_FAILURE,
            "runs: Permission denied. To fix, choose a place that you may read and write.",
        ),
        *(
            (
                error,
                EXIT_FAILURE,
                "a file cannot be written to its end. To fix, free space on its disk, or choose a "
                "folder on another one, and run the command again.",
            )
            for error in (
                RuntimeError(
                    "[enforce fail at inline_container.cc:664] PytorchStreamWriter failed"
                ),
                RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
                OSError("10000 requested and 109 written"),
            )
        ),
        (RuntimeError("CUDA out of memory"), EXIT_FAILURE, "CUDA out of memory"),
        (ValueError("größer als 狗"), EXIT_FAILURE, "größer als 狗"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failure_is_one_line_and_a_code(error, code, message, capsys):
    assert run_command(failing(error)) == code
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("two\n  lines\n\n", "two lines"),
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        ("a\x00b\u202e", r"a\x00b\u202e"),
        ("half \ud800", r"half \ud800"),
    ],
    ids=["lines", "colours", "direction", "surrogate"],
)
def test_a_message_is_one_line_whatever_it_names(message, line, capsys):
    assert run_command(failing(ValueError(message))) == EXIT_FAILURE
    assert capsys.readouterr().err == f"error: {line}\n"


def test_codes_are_those_of_the_shell():
    """2 as argparse has it for a wrong argument."""
    assert (EXIT_FAILURE, EXIT_USAGE) == (1, 2)


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("a bug"), SystemExit(3)])
def test_bugs_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_command(failing(error))


@pytest.mark.parametrize(("rank", "where"), [("0", ""), ("3", " (rank 3)")])
def test_other_ranks_say_who_they_are(rank, where, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert run_command(failing(ValueError("bad file"))) == EXIT_FAILURE
    assert capsys.readouterr().err == f"error{where}: bad file\n"


@pytest.mark.parametrize("error", [ConfigError("bad key"), ValueError("bad file")])
def test_traceback_on_request(error, capsys, monkeypatch):
    monkeypatch.setenv("BGE_PRUNING_TRACEBACK", "1")
    assert run_command(failing(error)) in (EXIT_FAILURE, EXIT_USAGE)
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "raise error" in err
    assert err.endswith(f"error: {error}\n")


# Logging


def test_messages_go_to_stderr_once(capsys):
    for _ in range(3):
        setup_logging()
    logging.getLogger("bge_pruning.train").info("step %d", 1)
    out, err = capsys.readouterr()
    assert out == ""
    clock, _, message = err.partition(" ")
    assert message == "step 1\n"
    assert [len(part) for part in clock.split(":")] == [2, 2, 2]


def test_messages_do_not_come_a_second_time_through_the_root_logger(package_logger):
    setup_logging()
    assert not package_logger.propagate
    assert len(package_logger.handlers) == 1


@pytest.mark.parametrize(
    ("rank", "levels"), [("0", ["INFO", "WARNING", "ERROR"]), ("1", ["ERROR"])]
)
def test_only_the_first_rank_chats(rank, levels, monkeypatch, package_logger):
    monkeypatch.setenv("RANK", rank)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging()
    for level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        package_logger.log(getattr(logging, level), level)
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == levels


def console(monkeypatch, terminal: bool) -> io.StringIO:
    """A standard error that setup_logging has written to."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging()
    logger = logging.getLogger("bge_pruning.x")
    logger.info("all well")
    logger.warning("careful")
    logger.error("broken")
    return stream


def test_warnings_and_errors_say_so(monkeypatch):
    lines = console(monkeypatch, terminal=False).getvalue().splitlines()
    said = [line.partition(" ")[2] for line in lines]
    assert said == ["all well", "WARNING: careful", "ERROR: broken"]


def test_on_a_terminal_they_have_a_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = console(monkeypatch, terminal=True).getvalue().splitlines()
    said = [line.partition(" ")[2] for line in lines]
    assert said[0] == "all well"
    assert said[1:] == ["\x1b[33mWARNING:\x1b[0m careful", "\x1b[31mERROR:\x1b[0m broken"]


def test_no_colour_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in console(monkeypatch, terminal=True).getvalue()


def test_what_is_for_the_file_alone_is_not_on_the_console(monkeypatch):
    stream = console(monkeypatch, terminal=False)
    before = stream.getvalue()
    logging.getLogger("bge_pruning.x").info("step 1", extra={FILE_ONLY: True})
    assert stream.getvalue() == before


def test_warnings_of_other_ranks_are_logged_but_not_shown(monkeypatch, package_logger):
    monkeypatch.setenv("RANK", "1")
    setup_logging()
    assert package_logger.isEnabledFor(logging.WARNING)
    assert not package_logger.isEnabledFor(logging.INFO)


def test_a_command_can_log(capsys):
    assert run_command(lambda: logging.getLogger("bge_pruning.x").warning("careful")) == 0
    assert capsys.readouterr().err.endswith(" careful\n")


def test_other_packages_are_left_alone():
    before = logging.getLogger().handlers[:], logging.getLogger("composer").level
    setup_logging()
    assert (logging.getLogger().handlers, logging.getLogger("composer").level) == before


# Optional work and libraries


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


def test_what_is_installed_is_imported():
    import json.decoder

    assert import_optional("json.decoder", "none") is json.decoder


@pytest.mark.parametrize("name", ["nowhere_at_all", "nowhere_at_all.inside"])
def test_what_is_missing_is_named_with_its_extra(name):
    message = r"^nowhere_at_all is not installed, and .* To fix, pip install -e '\.\[onnx\]'$"
    with pytest.raises(ImportError, match=message):
        import_optional(name, "onnx")


def test_a_library_that_lacks_another_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'nowhere_at_all'$"):
        import_optional("half_installed", "onnx")
    assert "half_installed" not in sys.modules
