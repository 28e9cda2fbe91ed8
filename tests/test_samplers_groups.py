"""`GroupSampler`: what every batch and every epoch holds, and that it can be resumed."""

import doctest
import json
import warnings
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pairclip import GroupSampler
from pairclip.samplers import group_sampler
from pairclip.samplers.decks import deal, dealt_of_each

checked = settings(deadline=None, derandomize=True, max_examples=100)


def quiet(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GroupSampler(*arguments, **options)


@st.composite
def samplers(draw):
    """A sampler that is possible, and what it was made with."""
    classes, samples = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    items = draw(st.lists(st.tuples(st.integers(-2, 4), st.integers(0, 3)), max_size=30))
    items += [(label, 1) for label in range(classes) for _ in range(samples)]
    items = draw(st.permutations(items))
    labels, groups = (np.array(part) for part in zip(*items, strict=True))
    options = {
        "num_batches": draw(st.integers(1, 12)),
        "mixed": draw(st.sampled_from([0, 0.2, 0.49])),
        "seed": draw(st.integers(0, 3)),
    }
    return labels, groups, classes, samples, options


def is_of_one_group(batch, groups):
    return len(set(groups[batch].tolist())) == 1


@checked
@given(samplers())
def test_every_batch_holds_k_items_of_p_classes_of_one_group_or_is_mixed(made):
    labels, groups, classes, samples, options = made
    sampler = quiet(labels, groups, classes, samples, **options)
    num_mixed = int(options["mixed"] * options["num_batches"] + 0.5)
    for _ in range(2):
        epoch = list(sampler)
        assert len(epoch) == len(sampler) == options["num_batches"]
        for batch in epoch:
            assert len(set(batch)) == len(batch) == sampler.batch_size
            counts = Counter(labels[batch].tolist())
            assert len(counts) == classes
            assert set(counts.values()) == {samples}
        of_one = sum(is_of_one_group(batch, groups) for batch in epoch)
        assert of_one >= len(epoch) - num_mixed


@checked
@given(samplers())
def test_groups_and_the_classes_in_them_take_turns_over_epochs(made):
    labels, groups, classes, samples, options = made
    sampler = quiet(labels, groups, classes, samples, **{**options, "mixed": 0})
    turns: Counter = Counter()
    drawn: Counter = Counter()
    for _ in range(5):
        for batch in sampler:
            number = groups[batch[0]]
            turns[number] += 1
            drawn.update({(number, label) for label in labels[batch].tolist()})
        sizes = Counter(zip(groups.tolist(), labels.tolist(), strict=True))
        large = [cell for cell, size in sizes.items() if size >= samples]
        possible = [g for g in set(groups.tolist()) if sum(c[0] == g for c in large) >= classes]
        counts = [turns[g] for g in possible]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == sum(turns.values())
        for g in possible:
            of_group = [drawn[cell] for cell in large if cell[0] == g]
            assert max(of_group) - min(of_group) <= 1


@checked
@given(samplers(), st.integers(0, 11), st.integers(0, 2))
def test_state_continues_with_the_very_next_batch(made, position, epoch):
    labels, groups, classes, samples, options = made
    sampler = quiet(labels, groups, classes, samples, **options)
    sampler.set_epoch(epoch)
    expected = list(sampler) + list(sampler)
    position %= len(sampler)
    sampler.set_epoch(epoch)
    for _ in islice(sampler, position):
        pass
    state = json.loads(json.dumps(sampler.state_dict()))
    other = quiet(labels, groups, classes, samples, **{**options, "seed": 7})
    other.load_state_dict(state)
    assert list(other) + list(other) == expected[position:]


@checked
@given(st.integers(1, 9), st.lists(st.integers(0, 20), max_size=6), st.integers(0, 3))
def test_what_earlier_epochs_dealt_is_known(size, epochs, seed):
    dealt = np.zeros(size, int)
    for epoch, count in enumerate(epochs):
        before = sum(epochs[:epoch])
        assert dealt_of_each(size, before, seed=seed).tolist() == dealt.tolist()
        rng = np.random.default_rng(epoch)
        drawn = deal(
            np.arange(size), np.array([count]), rng, seed=seed, dealt_before=before, distinct=False
        )
        dealt += np.bincount(drawn, minlength=size)


def test_an_epoch_shows_every_item_where_all_groups_are_alike():
    labels = np.repeat(np.arange(12), 6)
    groups = np.array(["a", "b", "c"])[labels % 3]
    sampler = GroupSampler(labels, groups, 2, 3)
    assert len(sampler) == 12
    epoch = list(sampler)
    assert sorted(item for batch in epoch for item in batch) == list(range(72))
    assert all(is_of_one_group(batch, groups) for batch in epoch)


def test_mixed_batches_stand_anywhere_among_the_others():
    labels = np.repeat(np.arange(40), 2)
    groups = labels // 4
    sampler = GroupSampler(labels, groups, 4, 2, mixed=0.25, num_batches=20)
    places = Counter()
    for _ in range(40):
        for place, batch in enumerate(sampler):
            places[place] += not is_of_one_group(batch, groups)
    assert sum(places.values()) > 40 * 5 * 0.9
    assert set(places) == set(range(20))
    assert min(places.values()) > 0


def test_a_class_of_two_groups_gives_items_of_the_batch_s_group():
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    groups = np.array([0, 0, 0, 0, 5, 5, 5, 5])
    for batch in GroupSampler(labels, groups, 2, 2, num_batches=9):
        assert is_of_one_group(batch, groups)


def test_what_is_left_out_is_counted_once():
    labels = [0, 0, 1, 1, 2, 0, 0, 3]
    groups = [0, 0, 0, 0, 0, 1, 1, 1]
    with pytest.warns(UserWarning, match=r"1 of 2 groups have fewer than 2 classes .* 4 items are"):
        sampler = GroupSampler(labels, groups, 2, 2)
    assert {i for batch in sampler for i in batch} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"groups": [0, 0]}, ValueError, r"one group for each of 4 labels, got shape \[2\]"),
        ({"groups": [[0]] * 4}, ValueError, r"for each of 4 labels, got shape \[4, 1\]"),
        ({"groups": [0.5] * 4}, TypeError, "`groups` must be integers or names, got float64"),
        ({"labels": [0.5] * 4}, TypeError, "`labels` must be integers"),
        ({"classes_per_batch": 0}, ValueError, "`classes_per_batch` must be at least 1, got 0"),
        ({"samples_per_class": 1.5}, TypeError, "`samples_per_class` must be an integer, got 1.5"),
        ({"mixed": 1}, ValueError, r"`mixed` must be in \[0, 1\), got 1. .*ClassBalancedSampler"),
        ({"mixed": "0"}, TypeError, "`mixed` must be a number, got '0'"),
        ({"mixed": 0.9, "num_batches": 2}, ValueError, "0.9 of 2 batches rounds to all of them"),
        ({"num_batches": 0}, ValueError, "`num_batches` must be at least 1, got 0"),
        ({"groups": [0, 0, 1, 1]}, ValueError, "None of 2 groups has 2 classes with 2 items each"),
        ({"seed": -1}, ValueError, "`seed` must not be negative"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(change, error, message):
    options = {
        "labels": [0, 0, 1, 1],
        "groups": [3] * 4,
        "classes_per_batch": 2,
        "samples_per_class": 2,
    }
    with pytest.raises(error, match=message):
        GroupSampler(**{**options, **change})


def test_the_example_is_right():
    failed, attempted = doctest.testmod(group_sampler)
    assert attempted > 3
    assert not failed
