"""Random batches of similar length, the same for any number of ranks."""

from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from bge_pruning.datasets.length_grouped_sampler import BATCHES_PER_GROUP, LengthGroupedSampler

LENGTHS = np.random.default_rng(0).permutation(1000) + 2  # all different


def build(
    lengths=LENGTHS, batch: int = 12, ranks: int = 1, rank: int = 0, seed: int = 5
) -> LengthGroupedSampler:
    return LengthGroupedSampler(list(lengths), lengths, batch, ranks, rank, seed)


def batches(sampler: LengthGroupedSampler, size: int) -> list[list[int]]:
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % size == 0
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
def test_a_batch_is_the_same_for_any_number_of_ranks(ranks):
    shares = [batches(build(ranks=ranks, rank=r), 12 // ranks) for r in range(ranks)]
    for step, whole in enumerate(batches(build(), 12)):
        union = [index for share in shares for index in share[step]]
        assert sorted(union) == sorted(whole)


def test_an_epoch_has_every_example_at_most_once_and_full_batches_only():
    order = list(build())
    assert len(order) == len(build()) == 83 * 12  # 4 of 1000 wait
    assert len(set(order)) == len(order)
    assert all(type(index) is int and 0 <= index < 1000 for index in order)


def test_examples_that_wait_come_in_another_epoch():
    sampler = build(np.arange(23), batch=12)
    seen = Counter()
    for epoch in range(200):
        sampler.set_epoch(epoch)
        seen.update(sampler)
    # Each of 23 examples is in 12 of 23 epochs: 104 times, with a standard deviation of 7.
    assert len(seen) == 23
    assert all(60 < count < 150 for count in seen.values())


def test_batches_hold_texts_of_similar_length():
    """In each group of batches the lengths are cut in order, so its batches do not overlap."""
    spans = [(min(LENGTHS[b]), max(LENGTHS[b])) for b in batches(build(), 12)]
    groups = -(-83 // BATCHES_PER_GROUP)
    overlaps = [sum(low <= length <= high for low, high in spans) for length in range(2, 1002)]
    assert max(overlaps) == groups
    # 12 lengths drawn from 1000 have a longest of 924 on average, sorted ones one of 536.
    padded = np.mean([high for _, high in spans])
    assert padded < 550


def test_batches_are_shuffled():
    """Neither short to long, nor group after group: else training would see lengths drift."""
    means = [np.mean(LENGTHS[b]) for b in batches(build(), 12)]
    steps = np.arange(len(means))
    assert abs(np.corrcoef(steps, means)[0, 1]) < 0.3
    descents = np.mean(np.diff(means) < 0)
    assert 0.35 < descents < 0.65


def test_epochs_and_seeds_differ_and_come_again():
    sampler = build()
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert set(map(frozenset, batches(sampler, 12))) != set(map(frozenset, batches(build(), 12)))
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(build(seed=6)) not in (first, second)


def test_composer_takes_it_for_a_distributed_sampler():
    """Composer calls ``set_epoch`` of those only, and refuses others on several ranks."""
    assert isinstance(build(), DistributedSampler)


def test_texts_of_one_length_are_still_shuffled():
    order = list(build(np.full(48, 7)))
    assert order != sorted(order)
    assert sorted(order) == list(range(48))


def test_one_batch_is_all_examples():
    assert sorted(build(np.arange(8), batch=8)) == list(range(8))


# Refusals


def test_batch_that_does_not_divide_is_refused():
    message = (
        "global_train_batch_size 12 does not divide over 5 processes. "
        "To fix, make it a multiple of 5."
    )
    with pytest.raises(ValueError, match=message):
        build(ranks=5)


@pytest.mark.parametrize("examples", [0, 11])
def test_batch_larger_than_the_data_is_refused(examples):
    message = (
        f"global_train_batch_size 12 is larger than the training data, {examples} examples. "
        "To fix, lower it or add data."
    )
    with pytest.raises(ValueError, match=message):
        build(np.arange(examples))


def test_the_epoch_is_in_the_index_if_asked_for():
    lengths = np.arange(20) % 7
    arguments = {"global_batch_size": 4, "num_replicas": 2, "rank": 1, "seed": 3}
    plain = LengthGroupedSampler(range(20), lengths, **arguments)
    marked = LengthGroupedSampler(range(20), lengths, **arguments, epoch_in_index=True)
    for epoch in (0, 3):
        plain.set_epoch(epoch)
        marked.set_epoch(epoch)
        assert list(marked) == [index + epoch * 20 for index in plain]
