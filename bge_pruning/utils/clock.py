"""The trainer's clock in batches, whatever unit a time is given in.

Composer counts the share of a run in the unit of its ``max_duration``: with ``2ep`` it stands still
for a whole epoch. Gates move every batch, so every time is turned into batches here.
"""

from __future__ import annotations

import math

from composer.core import State, Time, TimeUnit


def count_batches(time: Time, state: State) -> float:
    """Length of a time in batches, in a training whose data loader is set."""
    if time.unit == TimeUnit.BATCH:
        return time.value
    if time.unit == TimeUnit.EPOCH:
        return time.value * int(state.dataloader_len)
    if time.unit == TimeUnit.DURATION:
        return time.value * count_batches(state.max_duration, state)
    raise ValueError(
        f"time {time.to_timestring()} is not in ba, ep or dur. To fix, use one of these units."
    )


def elapsed_share(state: State) -> float:
    """Share of the run that is over, in [0, 1]."""
    return min(1.0, state.timestamp.batch.value / count_batches(state.max_duration, state))


def is_due(interval: Time, state: State, ahead: int = 0) -> bool:
    """Whether the batch that has just ended is at an interval, or the last one of the run.

    A part of a batch counts as a whole one. ``ahead`` asks of a batch that is this many further on:
    1 for the one that begins.
    """
    length = math.ceil(count_batches(interval, state) - 1e-9)  # 0.07 * 100 is 7.000000000000001
    batch = state.timestamp.batch.value + ahead
    return batch % length == 0 or batch >= count_batches(state.max_duration, state)
