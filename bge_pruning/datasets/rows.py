"""Rows of training data: what every reader yields, and what becomes of rows that are wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

# Of the rows that were skipped, as many are named in the log.
NAMED = 5


@dataclass(frozen=True)
class Row:
    """One row of any kind of data.

    A plain sentence is a text alone, a scored pair a text with one other and its score, a query a
    text with its passages: first the positives, then the negatives.

    Attributes:
        text: The sentence, the first of a pair, or the query.
        others: The other texts.
        positives: How many of the others, from the first, are positives of a query.
        scores: Score of each of the others, or ``None``.
    """

    text: str
    others: tuple[str, ...] = ()
    positives: int = 0
    scores: tuple[float, ...] | None = None


@dataclass
class BadRows:
    """What to do with rows that are wrong: stop at the first, or skip and count them.

    Attributes:
        skip: Skip instead of stopping.
        count: Rows skipped so far.
        examples: What was wrong with the first ones; each message names file and line.
    """

    skip: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around the reading of one row: a ``ValueError`` stops, or counts as a skipped row."""
        try:
            yield
        except ValueError as error:
            if not self.skip:
                raise
            self.count += 1
            if len(self.examples) < NAMED:
                self.examples.append(str(error))

    def report(self, name: str) -> None:
        """Say in the log what was skipped.

        Args:
            name: Name of the source.
        """
        if self.count:
            shown = "".join(f"\n  {example}" for example in self.examples)
            more = self.count - len(self.examples)
            rest = f"\n  and {more} more" if more else ""
            log.warning("%s: %d rows skipped\n%s%s", name, self.count, shown.lstrip("\n"), rest)
