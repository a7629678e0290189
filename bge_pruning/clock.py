"""The trainer's clock in batches, whatever unit a time is given in.

Composer counts the share of a run in the unit of its ``max_duration``: with ``2ep`` it stands still
for a whole epoch. Gates move every batch, so every time is turned into batches here.
"""

from __future__ import annotations

from composer.core import State, Time, TimeUnit


def count_batches(time: Time, state: State) -> float:
    """Length of a time in batches.

    Args:
        time: In batches, epochs, or as a share of the run.
        state: Of a training whose data loader is set.

    Raises:
        ValueError: If the time has another unit.
    """
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
