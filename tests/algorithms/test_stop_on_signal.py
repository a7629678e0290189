"""SIGTERM: the step is finished and saved, and the run can go on as if nothing had happened."""

import os
import signal
from types import SimpleNamespace

import pytest

from bge_pruning.algorithms import stop_on_signal
from bge_pruning.algorithms.stop_on_signal import StopOnSignal
from bge_pruning.callbacks.pruning_callback import PruningCallback
from bge_pruning.utils.guard import EXIT_STOPPED, run_command
from bge_pruning.utils.run_log import StoppedError

STEPS = ("max_duration=6ba", "save_interval=4ba", "eval_interval=6ba")


@pytest.fixture
def told_at(monkeypatch):

    def tell(step: int, times: int = 1) -> None:
        before = PruningCallback.batch_end

        def batch_end(self, state, logger):
            if state.timestamp.batch.value == step:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGTERM)
            before(self, state, logger)

        monkeypatch.setattr(PruningCallback, "batch_end", batch_end)

    return tell


def test_told_to_stop_it_saves_the_step_that_it_notices_in(
    tmp_path, train_tiny, told_at, load_state, assert_same, monkeypatch
):
    whole = train_tiny(tmp_path / "whole", *STEPS)
    told_at(2)  # noticed at the end of the step after it: algorithms run before callbacks
    message = r"^stopped by SIGTERM after step 3, which is saved\. To resume, .* autoresume=true\.$"
    with pytest.raises(StoppedError, match=message):
        train_tiny(tmp_path / "parts", *STEPS)
    parts = tmp_path / "parts" / "runs" / "tiny"
    assert sorted(p.name for p in parts.glob("ba*.pt")) == ["ba3-rank0.pt"]
    monkeypatch.undo()
    train_tiny(tmp_path / "parts", *STEPS, "autoresume=true")
    for part in ("model", "optimizers", "schedulers"):
        assert_same(load_state(parts)[part], load_state(whole)[part], 0.0, part)


def test_in_the_last_step_nothing_is_lost(tmp_path, train_tiny, told_at, load_state):
    told_at(6)
    with pytest.raises(StoppedError, match=r"after the last step\. To make the report, run"):
        train_tiny(tmp_path, *STEPS)
    assert load_state(tmp_path / "runs" / "tiny")["timestamp"]["Timestamp"]["batch"] == 6


def test_the_handler_is_put_back(tmp_path, train_tiny, told_at):
    before = signal.getsignal(signal.SIGTERM)
    train_tiny(tmp_path / "whole", "max_duration=1ba")
    assert signal.getsignal(signal.SIGTERM) == before
    told_at(2)
    with pytest.raises(StoppedError):
        train_tiny(tmp_path / "stopped", *STEPS)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_process():
    with StopOnSignal() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.told
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        finally:
            stop.told = False


def test_all_ranks_stop_if_one_was_told(monkeypatch):
    device = SimpleNamespace(tensor_to_device=lambda value: value)
    monkeypatch.setattr(stop_on_signal.dist, "get_world_size", lambda: 2)
    for other in (0, 1):
        monkeypatch.setattr(
            stop_on_signal.dist,
            "all_reduce",
            lambda value, reduce_operation, other=other: value.clamp_(min=other),
        )
        assert StopOnSignal()._anyone_told(SimpleNamespace(device=device)) is bool(other)


def test_the_exit_code_is_that_of_the_signal(capsys):
    def command():
        raise StoppedError("stopped")

    assert run_command(command) == EXIT_STOPPED == 143
    assert capsys.readouterr().err.endswith("error: stopped\n")
