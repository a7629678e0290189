"""Processes that evaluate one model: each embeds a part of the texts, and all get everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def _alone(part: T) -> list[T]:
    return [part]


@dataclass(frozen=True)
class Ranks:
    """This process among those that evaluate together; by default it is alone.

    All of them have to do the same with the same texts, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        gather: Collects an object of every process, in the order of their numbers, on all of them.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every ``count``-th item, which shares sorted lengths fairly."""
        return items[self.rank :: self.count]

    def order(self, total: int) -> np.ndarray:
        """Where each of ``total`` items is when the parts of all processes follow each other."""
        parts = [np.arange(rank, total, self.count) for rank in range(self.count)]
        return np.argsort(np.concatenate(parts))


ALONE = Ranks()
