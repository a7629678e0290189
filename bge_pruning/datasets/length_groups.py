"""Random batches of texts of similar length, the same whatever the number of ranks."""

from __future__ import annotations

import numpy as np

# Batches that are sorted together: more means less padding and less random batches.
BATCHES_PER_GROUP = 16


def group_batches(
    lengths: np.ndarray, batch_size: int, seed: tuple[int, ...], grouped: bool = True
) -> np.ndarray:
    """The batches of one epoch.

    The examples are shuffled, groups of ``BATCHES_PER_GROUP`` batches are sorted by length and cut
    into batches, and the batches are shuffled. Examples that do not fill the last batch wait for
    another epoch.

    Args:
        lengths: Tokens of each example, shape ``(n,)``.
        batch_size: Examples per batch.
        seed: Of the run, the epoch and so on; each gives another order.
        grouped: ``False`` shuffles only.

    Returns:
        Example indices, shape ``(n // batch_size, batch_size)``.
    """
    generator = np.random.default_rng(seed)
    batches = len(lengths) // batch_size
    order = generator.permutation(len(lengths))[: batches * batch_size]
    group = BATCHES_PER_GROUP * batch_size
    for start in range(0, len(order) if grouped else 0, group):
        part = order[start : start + group]
        order[start : start + group] = part[np.argsort(lengths[part], kind="stable")]
    return generator.permutation(order.reshape(batches, batch_size))


def padding_share(
    lengths: np.ndarray, tokens: np.ndarray, width: int, batches: np.ndarray
) -> float:
    """Share of padding if every text of a batch is padded to the longest of all.

    Args:
        lengths: Tokens of the longest text of each example, shape ``(n,)``.
        tokens: Tokens of all texts of each example, shape ``(n,)``.
        width: Texts of an example.
        batches: As :func:`group_batches` makes them.
    """
    padded = lengths[batches].max(axis=1).sum() * batches.shape[1] * width
    return 1.0 - float(tokens[batches].sum() / padded)
