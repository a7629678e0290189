"""Several sources in one run: proportions, batches of one source, going on without a replay."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from bge_pruning.datasets.mixed_dataloader import (
    BATCHES_PER_GROUP,
    MixedBatchSampler,
    MixedDataset,
    MixSchedule,
    adapt_weights,
    batch_indices,
    group_batches,
    padding_share,
)


def draws(schedule: MixSchedule, count: int) -> list[tuple[int, int]]:
    return [schedule.draw() for _ in range(count)]


weights_lists = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)


@given(weights_lists)
def test_every_source_has_its_share_at_every_moment(weights):
    share = np.array(weights) / sum(weights)
    drawn = np.zeros(len(weights))
    for step, (source, number) in enumerate(draws(MixSchedule(weights), 200), start=1):
        assert number == drawn[source]
        drawn[source] += 1
        assert np.abs(drawn - step * share).max() <= len(weights)


@given(weights_lists, st.integers(0, 60), st.integers(0, 60))
def test_the_batch_of_a_step_is_the_same_however_one_gets_there(weights, step, before):
    whole = draws(MixSchedule(weights), 80)
    schedule = MixSchedule(weights)
    draws(schedule, before)
    schedule.seek(step)
    assert draws(schedule, 20) == whole[step : step + 20]


def test_weights_change_from_a_step_on_and_are_remembered():
    schedule = MixSchedule([1, 1])
    first = draws(schedule, 10)
    schedule.update([9, 1])
    second = draws(schedule, 10)
    schedule.update([1, 9])
    third = draws(schedule, 10)
    counts = [sum(source == 0 for source, _ in part) for part in (first, second, third)]
    assert counts == [5, 9, 1]
    other = MixSchedule([1, 1])
    other.load_state_dict(schedule.state_dict())
    other.seek(15)
    assert draws(other, 15) == [*second[5:], *third]
    other.seek(3)
    assert draws(other, 5) == first[3:8]
    schedule.update([1, 3])
    schedule.update([3, 1])  # the last at a step counts
    assert schedule.weights().tolist() == [0.75, 0.25]
    assert len(schedule.updates) == 4


def test_parts_of_a_run_have_weights_of_their_own():
    """No batch of a source that a part does not name, whatever earlier parts left over."""
    parts = [(0, [1, 1, 0]), (5, [0, 1, 3]), (13, [1, 1, 1])]
    build = lambda: MixSchedule(parts[0][1], parts[1:])  # noqa: E731
    whole = draws(build(), 22)
    counts = [Counter(s for s, _ in whole[a:b]) for a, b in itertools.pairwise((0, 5, 13, 22))]
    assert counts == [{0: 3, 1: 2}, {1: 2, 2: 6}, {0: 3, 1: 3, 2: 3}]
    assert np.allclose(build().shares(22), np.array([2.5 + 3, 2.5 + 2 + 3, 6 + 3]) / 22)
    for batch in range(22):  # within a part, and at its beginning
        state = {**build().state_dict(), "batch": batch}
        resumed = build()
        resumed.load_state_dict(state)
        resumed.seek(batch)
        assert draws(resumed, 22 - batch) == whole[batch:]


def test_a_part_that_has_begun_stays_as_it_was_planned():
    saved = {**MixSchedule([1, 0], [(5, [1, 1])]).state_dict(), "batch": 5}
    later = MixSchedule([1, 0], [(5, [0, 1]), (9, [1, 1])])
    later.load_state_dict(saved)
    assert later.seek(5) is None
    assert [source for source, _ in draws(later, 4)] == [1] * 4
    for other in (MixSchedule([1, 0], [(4, [1, 1])]), MixSchedule([1, 2])):
        with pytest.raises(ValueError, match="trained with weights of the sources by step .*0, .1"):
            other.load_state_dict({**saved, "batch": 6})
    for none in ([0, 0], [1, -1]):
        with pytest.raises(ValueError, match="not all above 0"):
            MixSchedule(none, [(5, [1, 1])])


@pytest.mark.parametrize("weights", [[1, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights .* are not all above 0. To fix, set weight"):
        MixSchedule(weights)


def test_adapted_weights_are_those_of_the_paper():
    weights, losses, references = [0.5, 0.3, 0.2], [2.0, 0.5, 1.2], [1.0, 0.7, 1.1]
    expected = np.array([0.5 * np.exp(1.0), 0.3, 0.2 * np.exp(0.1)])  # a gain counts as 0
    assert np.allclose(adapt_weights(weights, losses, references), expected / expected.sum())
    huge = adapt_weights([0.5, 0.5], [1e4, 1e4 + 1], [0, 0])
    assert np.allclose(huge, [1 / (1 + np.e), np.e / (1 + np.e)])


class Examples:
    """``n`` examples; an item says which it is."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"example": (self.name, *divmod(index, self.count))}


COUNTS = {"small": 20, "large": 101}
LENGTHS = [np.arange(count) % 13 + 2 for count in COUNTS.values()]


def build(ranks: int = 1, rank: int = 0, weights=(1.0, 5.0), size: int = 4) -> MixedBatchSampler:
    sources = [Examples(name, count) for name, count in COUNTS.items()]
    dataset = MixedDataset(list(COUNTS), sources, MixSchedule(weights), size)
    return MixedBatchSampler(dataset, LENGTHS, ranks, rank, seed=3)


def epoch(sampler: MixedBatchSampler, number: int) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(number)
    return list(sampler)


def test_a_batch_is_of_one_source_and_an_epoch_as_long_as_all():
    batches = epoch(build(), 0)
    assert len(batches) == len(build()) == 20 // 4 + 101 // 4
    assert isinstance(build(), DistributedSampler)  # as Composer expects on several ranks
    assert all(len({source for source, _ in batch}) == 1 for batch in batches)
    assert all(len(batch) == 4 for batch in batches)


def test_each_source_has_epochs_of_its_own():
    sampler = build(weights=(5.0, 1.0))
    batches = list(itertools.chain.from_iterable(epoch(sampler, e) for e in range(4)))
    for source, count in enumerate(COUNTS.values()):
        indices = [i for batch in batches for s, i in batch if s == source]
        per_epoch = count // 4 * 4
        for number, start in enumerate(range(0, len(indices), per_epoch)):
            part = indices[start : start + per_epoch]
            assert len(set(part)) == len(part)
            assert all(i // count == number for i in part)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_batch_is_the_same_for_any_number_of_ranks(ranks):
    shares = [epoch(build(ranks, rank), 1) for rank in range(ranks)]
    for step, batch in enumerate(epoch(build(), 1)):
        assert sorted(i for share in shares for i in share[step]) == sorted(batch)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 17, 29, 30, 31, 44])
def test_a_run_goes_on_with_the_next_batch(stop, workers):
    """Loaded as the trainer does: state first, then the epoch, and a loader of what is left."""

    def loader(sampler: MixedBatchSampler) -> DataLoader:
        options = {"collate_fn": list, "num_workers": workers}
        return DataLoader(sampler.dataset, batch_sampler=sampler, **options)

    def examples(batches: list) -> list:
        assert all(item["example"][0] == item["source"] for batch in batches for item in batch)
        return [[item["example"] for item in batch] for batch in batches]

    first = build()
    per_epoch = len(first)
    everything, state = [], None
    for number in range(3):
        first.set_epoch(number)
        for index, batch in enumerate(loader(first)):
            if number * per_epoch + index == stop:
                state = first.dataset.state_dict(index * 4, True)
            everything.append(batch)
    second = build(weights=(3.0, 1.0))  # the state knows better
    second.dataset.load_state_dict(state)
    rest = []
    for number in range(stop // per_epoch, 3):
        second.set_epoch(number)
        rest += list(loader(second))
    assert examples(rest) == examples(everything[stop:])


def test_a_checkpoint_of_the_end_of_an_epoch_replays_nothing():
    """There the trainer may still be in the old epoch, or already say 0 examples of the next."""
    first = build()
    epoch(first, 0)
    for samples in (len(first) * 4, 0):
        second = build()
        second.dataset.load_state_dict(first.dataset.state_dict(samples, True))
        if samples:
            assert epoch(second, 0) == []
        assert epoch(second, 1) == epoch(first, 1)


def test_no_example_is_made_to_get_to_a_step(monkeypatch):
    sampler = build()
    monkeypatch.setattr(Examples, "__getitem__", lambda *_: pytest.fail("an example was made"))
    state = {"names": list(COUNTS), "batch": 10_000, **sampler.dataset.schedule.state_dict()}
    sampler.dataset.load_state_dict(state)
    assert epoch(sampler, 10_000 // len(sampler)) != []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["small", "other"]}, r"on small, other, the configuration names small, large\."),
        ({"batch_size": 2}, "with batch_size 2, the configuration gives 4"),
        ({"rows": [20, 99]}, r"with rows \[20, 99\], the configuration gives \[20, 101\]"),
    ],
)
def test_other_data_than_the_checkpoint_are_refused(changes, message):
    state = build().dataset.state_dict(0, True) | changes
    with pytest.raises(ValueError, match=f"the checkpoint was trained {message}.*To fix, resume"):
        build().dataset.load_state_dict(state)


def test_batches_that_cannot_be_filled_are_refused():
    message = r"global_train_batch_size 4 does not divide over 3 processes. To fix, make it a mult"
    with pytest.raises(ValueError, match=message):
        build(ranks=3)
    message = r"size 24 is larger than the training data, 20 examples of small. To fix, lower it"
    with pytest.raises(ValueError, match=message):
        build(size=24)


# Random batches of similar length

TOKENS = np.random.default_rng(0).permutation(1000) + 2  # all different


def test_an_epoch_has_every_example_at_most_once_and_full_batches_only():
    batches = group_batches(TOKENS, 12, (5, 0))
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
    batches = group_batches(TOKENS, 12, (5, 0))
    spans = [(min(TOKENS[b]), max(TOKENS[b])) for b in batches]
    groups = -(-83 // BATCHES_PER_GROUP)
    overlaps = [sum(low <= length <= high for low, high in spans) for length in range(2, 1002)]
    assert max(overlaps) == groups
    # 12 lengths drawn from 1000 have a longest of 924 on average, sorted ones one of 536.
    assert np.mean([high for _, high in spans]) < 550
    ungrouped = group_batches(TOKENS, 12, (5, 0), grouped=False)
    assert np.mean(TOKENS[ungrouped].max(axis=1)) > 880


def test_batches_are_shuffled():
    """Neither short to long, nor group after group: else training would see lengths drift."""
    order = group_batches(np.full(48, 7), 12, (5, 0)).ravel().tolist()
    assert order != list(range(48)) == sorted(order)
    means = TOKENS[group_batches(TOKENS, 12, (5, 0))].mean(axis=1)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3
    assert 0.35 < np.mean(np.diff(means) < 0) < 0.65


def test_seeds_differ_and_come_again():
    first = group_batches(TOKENS, 12, (5, 0))
    assert np.array_equal(group_batches(TOKENS, 12, (5, 0)), first)
    for other in ((5, 1), (6, 0), (5, 0, 1)):
        batches = group_batches(TOKENS, 12, other)
        assert set(map(frozenset, batches.tolist())) != set(map(frozenset, first.tolist()))


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


def test_batches_of_a_bounded_number_of_tokens():
    lengths = np.array([5, 100, 7, 30, 31, 200, 6])
    batches = [batch.tolist() for batch in batch_indices(lengths, 3, 100)]
    assert batches == [[5], [1], [4, 3, 2], [6, 0]]
    assert list(batch_indices(np.zeros(0, int), 3, 100)) == []


@given(
    st.integers(0, 70),
    st.integers(0, 70),
    st.lists(st.tuples(st.integers(0, 70), st.floats(0.1, 9.0)), max_size=3),
)
def test_what_is_drawn_is_known_before_it_is(first, more, updates):
    """For any weights that changed before, from any batch on, over epochs and for all ranks."""
    end, ranks = first + more, [build(2, rank) for rank in range(2)]
    for sampler in ranks:
        sampler.dataset.schedule.updates += [(s, np.array([1, w]) / (1 + w)) for s, w in updates]
    told = ranks[0].drawn(first, end)
    again = ranks[0].drawn(first, end)  # asking changes nothing
    found = [Counter(), Counter()]
    for sampler in ranks:
        batches = (batch for number in range(6) for batch in epoch(sampler, number))
        for batch in itertools.islice(batches, first, end):
            for source, example in batch:
                found[source][example] += 1
    for source, examples in enumerate(told):
        assert Counter(examples.tolist()) == found[source]
        assert np.array_equal(examples, again[source])
