"""Random batches of similar length."""

from collections import Counter

import numpy as np
import pytest

from bge_pruning.datasets.mixed_dataloader import BATCHES_PER_GROUP, group_batches, padding_share

LENGTHS = np.random.default_rng(0).permutation(1000) + 2  # all different


def test_an_epoch_has_every_example_at_most_once_and_full_batches_only():
    batches = group_batches(LENGTHS, 12, (5, 0))
    assert batches.shape == (83, 12)  # 4 of 1000 wait
    assert len(np.unique(batches)) == batches.size
    assert batches.min() >= 0 and batches.max() < 1000


def test_examples_that_wait_come_in_another_epoch():
    seen = Counter()
    for epoch in range(200):
        seen.update(group_batches(np.arange(23), 12, (5, epoch)).ravel().tolist())
    # Each of 23 examples is in 12 of 23 epochs: 104 times, with a standard deviation of 7.
    assert len(seen) == 23
    assert all(60 < count < 150 for count in seen.values())


def test_batches_hold_texts_of_similar_length():
    """In each group of batches the lengths are cut in order, so its batches do not overlap."""
    batches = group_batches(LENGTHS, 12, (5, 0))
    spans = [(min(LENGTHS[b]), max(LENGTHS[b])) for b in batches]
    groups = -(-83 // BATCHES_PER_GROUP)
    overlaps = [sum(low <= length <= high for low, high in spans) for length in range(2, 1002)]
    assert max(overlaps) == groups
    # 12 lengths drawn from 1000 have a longest of 924 on average, sorted ones one of 536.
    assert np.mean([high for _, high in spans]) < 550
    ungrouped = group_batches(LENGTHS, 12, (5, 0), grouped=False)
    assert np.mean(LENGTHS[ungrouped].max(axis=1)) > 880


def test_batches_are_shuffled():
    """Neither short to long, nor group after group: else training would see lengths drift."""
    means = LENGTHS[group_batches(LENGTHS, 12, (5, 0))].mean(axis=1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3
    assert 0.35 < np.mean(np.diff(means) < 0) < 0.65


def test_seeds_differ_and_come_again():
    first = group_batches(LENGTHS, 12, (5, 0))
    assert np.array_equal(group_batches(LENGTHS, 12, (5, 0)), first)
    for other in ((5, 1), (6, 0), (5, 0, 1)):
        batches = group_batches(LENGTHS, 12, other)
        assert set(map(frozenset, batches.tolist())) != set(map(frozenset, first.tolist()))


def test_texts_of_one_length_are_still_shuffled():
    order = group_batches(np.full(48, 7), 12, (5, 0)).ravel()
    assert order.tolist() != list(range(48))
    assert sorted(order) == list(range(48))


@pytest.mark.parametrize("width", [1, 2])
def test_padding_share_is_that_of_a_plain_count(width):
    generator = np.random.default_rng(1)
    lengths = generator.integers(2, 30, (60, width))
    batches = group_batches(lengths.max(axis=1), 8, (0, 0))
    real = padded = 0
    for batch in batches:
        longest = max(lengths[example].max() for example in batch)
        real += sum(lengths[example].sum() for example in batch)
        padded += longest * width * len(batch)
    share = padding_share(lengths.max(axis=1), lengths.sum(axis=1), width, batches)
    assert share == pytest.approx(1 - real / padded)
