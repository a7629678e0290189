"""What becomes of an error, and what a command says."""

import io
import logging
import signal
import sys

import pytest

from bge_pruning.config.schema import ConfigError
from bge_pruning.utils import guard
from bge_pruning.utils.guard import import_optional, run_command, setup_logging, warn_only
from bge_pruning.utils.run_log import FILE_ONLY, StoppedError, stoppable

SPACE = (
    "To fix, free space on its disk, or choose a folder on another one, and run the command again."
)
RIGHTS = "To fix, choose a place that you may read and write."
CUT_OFF = f"a file cannot be written to its end. {SPACE}"
PLAIN = ["all well", "WARNING: careful", "ERROR: broken"]
COLOURED = ["all well", "\x1b[33mWARNING:\x1b[0m careful", "\x1b[31mERROR:\x1b[0m broken"]


@pytest.fixture(autouse=True)
def package_logger(monkeypatch):
    """The package's logger as a new process has it, put back at the end."""
    for name in ("RANK", "BGE_PRUNING_TRACEBACK", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("bge_pruning")
    before = logger.handlers[:], logger.propagate, logger.level
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


def failing(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bad file"), "bad file"),
        (FileNotFoundError("a.csv: no such file"), "a.csv: no such file"),
        (OSError(2, "No such file", "a.csv"), "a.csv: No such file. To fix, check the path."),
        (OSError(28, "No space left", "a.pt"), f"a.pt: No space left. {SPACE}"),
        (OSError(27, "File too large"), f"File too large. {SPACE}"),
        (OSError(13, "Permission denied", "runs"), f"runs: Permission denied. {RIGHTS}"),
        (RuntimeError("[at inline_container.cc:664] PytorchStreamWriter failed"), CUT_OFF),
        (RuntimeError("[at inline_container.cc:659] . unexpected pos 64 vs 0"), CUT_OFF),
        (OSError("10000 requested and 109 written"), CUT_OFF),
        (RuntimeError("CUDA out of memory"), "CUDA out of memory"),
        (ValueError("größer als 狗"), "größer als 狗"),
        (ValueError("two\n  lines\n\n"), "two lines"),
        (ValueError("a\x1b[31mred\x07"), r"a\x1b[31mred\x07"),
        (ValueError("a\x00b\u202e"), r"a\x00b\u202e"),
        (ValueError("half \ud800"), r"half \ud800"),
    ],
)
def test_failure_is_one_line_and_a_code(error, message, capsys):
    assert run_command(failing(error)) == 1
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_codes_are_those_of_argparse_and_the_shell(capsys):
    done = []
    assert run_command(lambda: done.append(1)) == 0
    assert done == [1]
    assert capsys.readouterr() == ("", "")
    assert run_command(failing(ConfigError("seed -1 is not 0 or more."))) == 2
    assert capsys.readouterr().err == "error: seed -1 is not 0 or more.\n"


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (KeyboardInterrupt(), 130, "Ctrl-C"),
        (SystemExit(130), 130, "Ctrl-C"),  # once Composer is imported
        (SystemExit(143), 143, "SIGTERM"),
    ],
)
def test_a_signal_is_one_line_and_its_code(error, code, name, capsys):
    assert run_command(failing(error)) == code
    assert capsys.readouterr().err == f"error: stopped by {name}\n"

    def resumable() -> None:
        with stoppable("run it again"):
            raise error

    assert run_command(resumable) == code
    assert capsys.readouterr().err == f"error: stopped by {name}. To go on, run it again.\n"


def test_a_second_signal_does_not_hide_what_the_first_one_saved():
    """Composer's launcher sends SIGTERM after Ctrl-C."""
    again = SystemExit(143)
    again.__context__ = StoppedError("stopped after step 3", signal.SIGINT)
    with pytest.raises(StoppedError, match="step 3"), stoppable("run it again"):
        raise again


def test_only_the_first_rank_says_that_all_ranks_stop(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run_command(failing(StoppedError("stopped"))) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("a bug"), SystemExit(3)])
def test_bugs_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_command(failing(error))


@pytest.mark.parametrize(("rank", "where"), [("0", ""), ("3", " (rank 3)")])
def test_other_ranks_say_who_they_are(rank, where, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    assert run_command(failing(ValueError("bad file"))) == 1
    assert capsys.readouterr().err == f"error{where}: bad file\n"


@pytest.mark.parametrize("error", [ConfigError("bad key"), ValueError("bad file")])
def test_traceback_on_request(error, capsys, monkeypatch):
    monkeypatch.setenv("BGE_PRUNING_TRACEBACK", "1")
    assert run_command(failing(error)) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert "raise error" in err
    assert err.endswith(f"error: {error}\n")


def test_messages_go_to_stderr_once(capsys, package_logger):
    other = logging.getLogger().handlers[:], logging.getLogger("composer").level
    for _ in range(3):
        setup_logging()
    logging.getLogger("bge_pruning.train").info("step %d", 1)
    out, err = capsys.readouterr()
    assert out == ""
    clock, _, message = err.partition(" ")
    assert message == "step 1\n"
    assert [len(part) for part in clock.split(":")] == [2, 2, 2]
    assert not package_logger.propagate and len(package_logger.handlers) == 1
    assert (logging.getLogger().handlers, logging.getLogger("composer").level) == other


def console(monkeypatch, terminal: bool = False) -> list[str]:
    """What a command that logs writes to standard error, without the times."""
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)

    def command():
        logger = logging.getLogger("bge_pruning.x")
        logger.debug("nothing for a person")
        logger.info("all well")
        logger.info("step 1", extra={FILE_ONLY: True})
        logger.warning("careful")
        logger.error("broken")

    assert run_command(command) == 0
    return [line.partition(" ")[2] for line in stream.getvalue().splitlines()]


def test_only_the_first_rank_chats_and_others_warn_in_the_file(monkeypatch, package_logger):
    monkeypatch.setenv("RANK", "1")
    assert console(monkeypatch) == ["ERROR: broken"]
    assert package_logger.isEnabledFor(logging.WARNING)
    assert not package_logger.isEnabledFor(logging.INFO)


@pytest.mark.parametrize(
    ("terminal", "no_colour", "lines"),
    [(False, "", PLAIN), (True, "", COLOURED), (True, "1", PLAIN)],
)
def test_warnings_and_errors_have_a_colour_on_a_terminal(terminal, no_colour, lines, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_colour)
    assert console(monkeypatch, terminal) == lines


@pytest.mark.usefixtures("failures_may_be_hidden")
def test_an_error_becomes_a_warning_with_its_reason_and_place_and_an_interrupt_does_not(caplog):
    with warn_only("the report", "write it again"):
        pass
    with pytest.raises(KeyboardInterrupt), warn_only("the report", "write it again"):
        raise KeyboardInterrupt
    assert caplog.records == []
    with caplog.at_level(logging.WARNING), warn_only("the report", "write it again"):
        raise RuntimeError("no font")
    (record,) = caplog.records
    assert record.getMessage() == (
        "the report failed, and the run goes on without it: RuntimeError: no font. "
        "To fix, write it again."
    )
    assert record.exc_info[0] is RuntimeError


def test_tests_see_what_users_are_only_warned_of():
    with pytest.raises(AssertionError, match="no font"), warn_only("the report", "write it again"):
        raise RuntimeError("no font")
    assert guard.log.name == "bge_pruning.utils.guard"


@pytest.mark.parametrize("name", ["nowhere_at_all", "nowhere_at_all.inside"])
def test_what_is_missing_is_named_with_its_extra(name):
    assert import_optional("logging", "none") is logging
    message = r"^nowhere_at_all is not installed, and .* To fix, pip install -e '\.\[onnx\]'$"
    with pytest.raises(ImportError, match=message):
        import_optional(name, "onnx")


def test_a_library_that_lacks_another_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'nowhere_at_all'$"):
        import_optional("half_installed", "onnx")
    assert "half_installed" not in sys.modules
