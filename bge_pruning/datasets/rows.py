"""Rows of training data: single rows, tables of them as arrays, and invalid rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

log = logging.getLogger(__name__)
T = TypeVar("T")

# How many skipped rows the log names.
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
        prompt: What is written before the text; ``None``: the prompt of its role.
        others_prompt: What is written before each of the others.
    """

    text: str
    others: tuple[str, ...] = ()
    positives: int = 0
    scores: tuple[float, ...] | None = None
    prompt: str | None = None
    others_prompt: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """All texts, without prompts."""
        return (self.text, *self.others)

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts as a model gets them."""
        if not (self.prompt or self.others_prompt):
            return self.words
        others = (self.others_prompt + text for text in self.others)
        return ((self.prompt or "") + self.text, *others)

    def with_prompts(self, prompts: Mapping[str, str]) -> Row:
        """The row with the prompts of its roles: one for all, or ``query`` and ``passage``.

        A row's own prompt stays. A text without others is a passage, if it may be one.
        """
        role, others = tuple(prompts) * 2 if len(prompts) == 1 else ("query", "passage")
        own = prompts[role if self.others else others] if self.prompt is None else self.prompt
        return replace(self, prompt=own, others_prompt=prompts[others])


@dataclass(frozen=True)
class RowTable:
    """Many rows as indices into a table of texts.

    Attributes:
        texts: Texts of all rows, one row after the other, the first of each row first; ``(m,)``.
        starts: Start of each row in ``texts``, and the end of the last; ``(n + 1,)``.
        positives: See :class:`Row`; ``(n,)``.
        scores: Score of each of ``texts``, NaN where there is none; ``(m,)``.
        words: A number for each text in the table, which those share that have the same words after
            different prompts; ``None`` if there are none.
    """

    texts: np.ndarray
    starts: np.ndarray
    positives: np.ndarray
    scores: np.ndarray
    words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def first(self) -> np.ndarray:
        """The first text of each row, its query if it has passages."""
        return self.texts[self.starts[:-1]]

    def words_of(self, texts: np.ndarray) -> np.ndarray:
        """Numbers that two texts share if only their prompts differ."""
        return texts if self.words is None else self.words[texts]

    def negatives_of(self, row: int) -> np.ndarray:
        """Texts of a row's given negatives."""
        return self.texts[self.starts[row] + 1 + self.positives[row] : self.starts[row + 1]]

    @property
    def roles(self) -> np.ndarray:
        """What each of ``texts`` is to its row: 0 the first, 1 a positive, 2 another."""
        counts = np.diff(self.starts)
        place = np.arange(len(self.texts)) - np.repeat(self.starts[:-1], counts)
        return (place > 0).astype(np.int8) + (place > np.repeat(self.positives, counts))

    def select(self, rows: np.ndarray) -> RowTable:
        """Some of the rows, in their order."""
        kept = np.repeat(rows, np.diff(self.starts))
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        parts = (self.texts[kept], starts, self.positives[rows], self.scores[kept])
        return RowTable(*parts, self.words)


@dataclass
class BadRows:
    """Policy for invalid rows: stop at the first, or skip and count them.

    ``examples`` say what was wrong with the first ones; each message names file and line. ``notes``
    say what else of the data a reader should know; it stops nothing.
    """

    skip: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Read one row inside: a ``ValueError`` stops, or counts as a skipped row."""
        try:
            yield
        except ValueError as error:
            if not self.skip:
                raise
            self.count += 1
            if len(self.examples) < NAMED:
                self.examples.append(str(error))

    def attempt(self, read: Callable[..., T], *arguments: object) -> T | None:
        """What a function reads, or ``None`` if the row is skipped."""
        with self.guard():
            return read(*arguments)
        return None

    def report(self, name: str) -> None:
        """Log the rows that were skipped, and the notes."""
        for note in self.notes:
            log.warning("%s: %s", name, note)
        if self.count:
            shown = "".join(f"\n  {example}" for example in self.examples)
            more = self.count - len(self.examples)
            rest = f"\n  and {more} more" if more else ""
            log.warning("%s: %d rows skipped\n%s%s", name, self.count, shown.lstrip("\n"), rest)
