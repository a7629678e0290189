"""Times in batches, whatever unit they are given in."""

import pytest
import torch
from composer.core import State, Time, Timestamp
from composer.devices import DeviceCPU
from torch.utils.data import DataLoader

from bge_pruning.utils.clock import count_batches, elapsed_share, is_due


def make_state(max_duration: str, batch: int = 0) -> State:
    """A training of five batches an epoch that has done some."""
    state = State(torch.nn.Linear(1, 1), 0, "run", DeviceCPU(), max_duration=max_duration)
    state.set_dataloader(DataLoader(torch.zeros(10, 1), batch_size=2), "train")
    state.timestamp = Timestamp(batch=batch)
    return state


@pytest.mark.parametrize(
    ("time", "duration", "batches"),
    [
        ("7ba", "20ba", 7),
        ("3ep", "20ba", 15),
        ("0.5dur", "20ba", 10),
        ("0.5dur", "3ep", 7.5),
        ("1dur", "2ep", 10),
    ],
)
def test_every_unit_in_batches(time, duration, batches):
    assert count_batches(Time.from_timestring(time), make_state(duration)) == batches
    message = r"time 3tok is not in ba, ep or dur\. To fix, use one of these units\."
    with pytest.raises(ValueError, match=message):
        count_batches(Time.from_timestring("3tok"), make_state(duration))


@pytest.mark.parametrize(
    ("duration", "batch", "share"),
    [("20ba", 0, 0.0), ("20ba", 5, 0.25), ("2ep", 3, 0.3), ("2ep", 10, 1.0), ("2ep", 12, 1.0)],
)
def test_elapsed_share_moves_every_batch(duration, batch, share):
    assert elapsed_share(make_state(duration, batch)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("interval", "duration", "batches"),
    [
        ("3ba", "10ba", [3, 6, 9, 10]),
        ("1ep", "12ba", [5, 10, 12]),
        ("0.5dur", "2ep", [5, 10]),
        ("0.15dur", "10ba", [2, 4, 6, 8, 10]),  # every 1.5 batches is every second one
        ("0.01dur", "10ba", list(range(1, 11))),
        ("0.07dur", "100ba", [*range(7, 99, 7), 100]),
    ],
)
def test_due_at_the_interval_and_at_the_end(interval, duration, batches):
    time = Time.from_timestring(interval)
    run = range(1, batches[-1] + 1)
    assert [b for b in run if is_due(time, make_state(duration, b))] == batches
