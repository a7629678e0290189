"""Keys inside of those of the data: passages of articles, and the mixtures of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from bge_pruning.config.keys import key

# OmegaConf reads the annotations at run time and knows Optional[...] best.
# ruff: noqa: UP045


@dataclass
class PassagesConfig:
    """Passages that articles are cut into at the ends of sentences.

    Lengths are in tokens of the model, those of title, prompt and special tokens included.
    """

    min_tokens: int = key(64, bound="above 0")  # what is left of an article is left out below it
    max_tokens: int = key(512, bound="above 0")
    long_share: float = key(0.0, bound="in [0, 1]")  # of the articles, cut into long passages
    long_max_tokens: int = key(8192, bound="above 0")


@dataclass
class MixtureConfig:
    """A part of a run, and which sources its batches come from."""

    # How long it is, or the step or share of the run with which it ends; the last one: 1dur.
    steps: Optional[int] = key(None, bound="above 0")
    until: Optional[str] = key(None, units=("ba", "dur"))
    # Shares of the batches by source; default: those of all sources. None are of one not named.
    weights: dict[str, float] = field(default_factory=dict)
