"""Whether held-out data are held out: what is evaluated on and also trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.text_files import text_key
from bge_pruning.evaluation.tasks import SIMILARITY, Task
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.training.rank_watch import rank_zero_first
from bge_pruning.training.sources import build_corpus, source_reader

log = logging.getLogger(__name__)

# Keys of training texts that are compared at once.
CHUNK = 1 << 20

# A query, or the two sentences of a pair.
Item = tuple[str, ...]


def check_held_out(
    config: Config,
    base: BaseModel,
    tasks: Mapping[str, Task],
    pairs: bool = True,
    refuse: bool = True,
) -> None:
    """Refuse, or warn of, a query or pair to evaluate all of whose texts are trained on.

    Of translations, neither a query nor its answer may be trained on. Texts are compared without
    their case and spaces, whatever kind of source they are trained in; passages of other
    collections may be trained on. A training text costs one number of its cache.

    Args:
        tasks: What is evaluated, by name.
        pairs: Whether to look at the scored pairs of ``data.eval`` too.
        refuse: Whether to heed the key: a run that resumes only warns.

    Raises:
        ConfigError: If there is one and ``data.on_trained_eval`` is ``error``.
        ValueError: If a row of a source is invalid.
    """
    items = _scored_pairs(config) if pairs else {}
    items |= {name: _items(task) for name, task in tasks.items()}
    if not items:
        return
    with rank_zero_first():
        keys = {
            source.name: build_corpus(source, config, base).keys for source in config.data.train
        }
    found = [text for name, what in items.items() if (text := _describe(name, *what, keys))]
    if found and refuse and config.data.on_trained_eval == "error":
        raise ConfigError(
            f"{'; '.join(found)}. A score there tells what the model remembers. To fix, leave them "
            f"out of the training data or out of what is evaluated, or set "
            f"data.on_trained_eval=warn."
        )
    for text in found:
        log.warning("%s", text)


def _scored_pairs(config: Config) -> dict[str, tuple[str, list[Item]]]:
    skip = config.data.on_bad_row == "skip"
    return {
        source.name: ("pairs", [row.words for row in source_reader(source, config)(BadRows(skip))])
        for source in config.data.eval
        if not source.is_collection
    }


def _items(task: Task) -> tuple[str, list[Item]]:
    """What of a task must not be trained on, and what to call it."""
    if task.kind == SIMILARITY:
        first, second, _ = task.pairs()
        return "pairs", list(zip(first, second, strict=True))
    if task.translated:
        return "sentences", [(text,) for text in [*task.queries(), *task.passages()]]
    return "queries", [(text,) for text in task.queries()]


def _describe(name: str, kind: str, items: Sequence[Item], keys: Mapping[str, np.ndarray]) -> str:
    """What of a task is trained on, in words; empty if nothing is."""
    wanted = np.array([[text_key(text) for text in item] for item in items], np.uint64)
    known = {source: find_keys(wanted, values) for source, values in keys.items()}
    trained = np.any(list(known.values()), axis=0).all(axis=1)
    if not trained.any():
        return ""
    sources = [source for source, found in known.items() if found[trained].any()]
    example = "' and '".join(text[:80] for text in items[int(trained.argmax())])
    return (
        f"{name}: {trained.sum():,} of {len(items):,} {kind} are trained on too, in "
        f"{', '.join(sources)}, such as '{example}'"
    )


def find_keys(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which keys are among those of many texts, read piece by piece; shape as ``wanted``."""
    sought, place = np.unique(wanted, return_inverse=True)
    found = np.zeros(len(sought), bool)
    for start in range(0, len(keys), CHUNK):
        part = np.asarray(keys[start : start + CHUNK])
        near = np.searchsorted(sought, part).clip(max=len(sought) - 1)
        found[near[sought[near] == part]] = True
    return found[place].reshape(wanted.shape)
