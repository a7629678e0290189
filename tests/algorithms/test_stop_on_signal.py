"""Signals: the step is finished and saved, and the run can go on as if nothing had happened."""

import os
import signal
from types import SimpleNamespace

import pytest
from composer.core import Event, Timestamp

from bge_pruning.algorithms import stop_on_signal
from bge_pruning.algorithms.stop_on_signal import StopOnSignal
from bge_pruning.callbacks.pruning_callback import PruningCallback
from bge_pruning.utils.run_log import SIGNALS, StoppedError

STEPS = ("max_duration=6ba", "save_interval=4ba", "eval_interval=6ba")


@pytest.fixture
def told_at(monkeypatch):

    def tell(step: int, number: int = signal.SIGTERM) -> None:
        before = PruningCallback.batch_end

        def batch_end(self, state, logger):
            if state.timestamp.batch.value == step:
                os.kill(os.getpid(), number)
            before(self, state, logger)

        monkeypatch.setattr(PruningCallback, "batch_end", batch_end)

    return tell


@pytest.mark.parametrize(("number", "name"), SIGNALS.items())
def test_told_to_stop_it_saves_the_step_that_it_notices_in(
    number, name, tmp_path, train_tiny, told_at, load_state, assert_same, monkeypatch, capfd
):
    whole = train_tiny(tmp_path / "whole", *STEPS)
    told_at(2, number)  # noticed at the end of the step after it: algorithms run before callbacks
    message = rf"^stopped by {name} after step 3, which is saved\. To resume, run the same command "
    with pytest.raises(StoppedError, match=message + r"with autoresume=true\.$") as caught:
        train_tiny(tmp_path / "parts", *STEPS)
    assert caught.value.number == number
    assert (
        capfd.readouterr().err.count(f"{name}: the step is finished and saved, then the run") == 1
    )
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
    before = [signal.getsignal(number) for number in SIGNALS]
    train_tiny(tmp_path / "whole", "max_duration=1ba")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    told_at(2)
    with pytest.raises(StoppedError):
        train_tiny(tmp_path / "stopped", *STEPS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("first", "second"), [tuple(SIGNALS), tuple(reversed(SIGNALS))])
def test_the_same_signal_again_ends_the_process_and_another_one_does_not(first, second):
    """Composer's launcher sends SIGTERM after Ctrl-C."""
    with StopOnSignal("resume") as stop:
        try:
            os.kill(os.getpid(), first)
            assert signal.getsignal(first) == signal.SIG_DFL
            os.kill(os.getpid(), second)
            assert stop.told == first
        finally:
            stop.told = 0


def test_all_ranks_stop_if_one_was_told(monkeypatch):
    device = SimpleNamespace(tensor_to_device=lambda value: value)
    monkeypatch.setattr(stop_on_signal.dist, "get_world_size", lambda: 2)
    for other in (0, signal.SIGINT):
        monkeypatch.setattr(
            stop_on_signal.dist,
            "all_reduce",
            lambda value, reduce_operation, other=other: value.clamp_(min=other),
        )
        stop = StopOnSignal("resume")
        stop.apply(Event.FIT_END, SimpleNamespace(device=device, timestamp=Timestamp()), None)
        assert stop.told == other
