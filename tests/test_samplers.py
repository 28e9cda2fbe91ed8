"""Batch samplers: what every batch and every epoch holds, and that both can be resumed."""

import doctest
import json
import time
import warnings
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from scipy.stats import chisquare
from torch.utils.data import DataLoader

from pairclip import ClassBalancedSampler, PairSampler
from pairclip.samplers import batch_size_within, decks, pair_sampler

checked = settings(deadline=None, derandomize=True, max_examples=100)

counts = st.one_of(st.none(), st.integers(1, 9))
seeds = st.integers(0, 5)
chunks = st.sampled_from([1, 7, 1 << 16])
FRACTIONS = [0, 0.1, 0.25, 0.5, 0.7, 1]


@st.composite
def labels_of_items(draw, most=60):
    classes = draw(st.integers(-3, 12))
    return draw(st.lists(st.integers(-3, classes), min_size=1, max_size=most))


@st.composite
def any_pairs(draw):
    return {
        "labels": draw(labels_of_items()),
        "pairs_per_batch": draw(st.integers(1, 16)),
        "positive_fraction": draw(st.sampled_from(FRACTIONS)),
        "num_batches": draw(counts),
        "class_balanced": draw(st.booleans()),
        "seed": draw(seeds),
    }


@st.composite
def possible_pairs(draw, *, lone_items=True, **fixed):
    options = draw(any_pairs()) | fixed
    if not lone_items:
        options["labels"] += options["labels"]
    if len(options["labels"]) == 1:
        options["labels"] += [5]
    options["pairs_per_batch"] = draw(st.integers(1, min(16, len(options["labels"]))))
    possible = [f for f in FRACTIONS if is_possible(**options | {"positive_fraction": f})]
    return options | {"positive_fraction": draw(st.sampled_from(possible))}


@st.composite
def any_classes(draw):
    return {
        "labels": draw(labels_of_items()),
        "classes_per_batch": draw(st.integers(1, 6)),
        "samples_per_class": draw(st.integers(1, 6)),
        "num_batches": draw(counts),
        "seed": draw(seeds),
    }


@st.composite
def possible_classes(draw):
    options = draw(any_classes())
    sizes = sorted(Counter(options["labels"]).values(), reverse=True)
    classes = draw(st.integers(1, min(6, len(sizes))))
    samples = draw(st.integers(1, min(6, sizes[classes - 1])))
    return options | {"classes_per_batch": classes, "samples_per_class": samples}


def quiet(make, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **options)


def stream(sampler):
    while True:
        yield from sampler


def sides(batch):
    return tuple(np.array(side) for side in PairSampler.split(batch))


def anchors_of(batches):
    return np.concatenate([sides(batch)[0] for batch in batches])


def spread(values):
    values = list(values)
    return max(values) - min(values)


def is_possible(labels, pairs_per_batch, positive_fraction, class_balanced, **_):
    sizes = Counter(labels)
    matching = int(positive_fraction * pairs_per_batch + 0.5)
    paired = sum(size for size in sizes.values() if size > 1)
    return (
        pairs_per_batch <= len(labels)
        and (positive_fraction in (0, 1) or 0 < matching < pairs_per_batch)
        and (matching == pairs_per_batch or len(sizes) > 1)
        and (not matching or paired > 0)
        and (class_balanced or matching <= paired)
    )


@settings(checked, max_examples=150)
@given(any_pairs())
def test_exactly_the_impossible_pairs_are_refused(options):
    if is_possible(**options):
        quiet(PairSampler, **options)
    else:
        with pytest.raises(ValueError, match=r"`(pairs_per_batch|positive_fraction|labels)`"):
            quiet(PairSampler, **options)


@settings(checked, max_examples=150)
@given(possible_pairs(), chunks)
def test_every_batch_of_pairs_is_as_asked_for(options, chunk):
    sampler = quiet(PairSampler, **options)
    labels, pairs = np.array(options["labels"]), options["pairs_per_batch"]
    matching = int(options["positive_fraction"] * pairs + 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_sampler, "_PAIRS_AT_ONCE", chunk)
        for _ in range(2):
            epoch = list(sampler)
            assert len(epoch) == len(sampler)
            assert len(epoch) == (options["num_batches"] or -(-len(labels) // pairs))
            for batch in epoch:
                assert len(batch) == sampler.batch_size == 2 * pairs
                assert all(type(index) is int for index in batch)
                anchors, partners = sides(batch)
                assert (anchors != partners).all()
                assert (labels[anchors] == labels[partners]).sum() == matching
                if not options["class_balanced"]:
                    assert len(set(anchors.tolist())) == pairs


@settings(checked, max_examples=150)
@given(possible_pairs(num_batches=None, class_balanced=False))
def test_every_item_is_an_anchor_in_every_epoch_where_there_are_places(options):
    sampler = quiet(PairSampler, **options)
    labels, pairs = options["labels"], options["pairs_per_batch"]
    sizes = Counter(labels)
    alone = {item for item, label in enumerate(labels) if sizes[label] == 1}
    paired = set(range(len(labels))) - alone
    places = len(sampler) * (pairs - int(options["positive_fraction"] * pairs + 0.5))
    for _ in range(2):
        times = Counter(anchors_of(sampler).tolist())
        assert paired <= set(times)
        assert len(alone & set(times)) == min(len(alone), places)
        for items in alone, paired:
            assert not items or spread(times[item] for item in items) <= 1


@checked
@given(possible_pairs(lone_items=False, num_batches=None, class_balanced=False))
def test_no_item_anchors_again_before_the_last_batch(options):
    sampler = PairSampler(**options)
    anchors = anchors_of(sampler)[: -options["pairs_per_batch"]].tolist()
    assert len(set(anchors)) == len(anchors)


@settings(checked, max_examples=150)
@given(possible_pairs(class_balanced=True))
def test_balanced_classes_anchor_equally_often(options):
    sampler = quiet(PairSampler, **options)
    labels, pairs = np.array(options["labels"]), options["pairs_per_batch"]
    sizes = Counter(options["labels"])
    places = len(sampler) * (pairs - int(options["positive_fraction"] * pairs + 0.5))
    for _ in range(2):
        anchors = anchors_of(sampler)
        items, classes = Counter(anchors.tolist()), Counter(labels[anchors].tolist())
        alone = [classes[label] for label in sizes if sizes[label] == 1]
        paired = [classes[label] for label in sizes if sizes[label] > 1]
        for of_kind in alone, paired:
            assert not of_kind or spread(of_kind) <= 1
        if spread(alone + paired) > 1:
            assert sum(alone) == places
            assert max(alone) <= min(paired)
        for label in sizes:
            assert spread(items[item] for item in np.flatnonzero(labels == label)) <= 1


@settings(checked, max_examples=100)
@given(labels_of_items(most=20), st.integers(1, 4), st.integers(1, 3), st.booleans(), seeds)
def test_items_take_turns_over_short_epochs(labels, matching, num_batches, class_balanced, seed):
    labels = [7, 7, 8, 8, *labels]
    options = {"num_batches": num_batches, "class_balanced": class_balanced, "seed": seed}
    assume(is_possible(labels, 2 * matching, 0.5, class_balanced))
    sampler = quiet(PairSampler, labels, 2 * matching, **options)
    missing = set(range(len(labels)))
    for _ in range(60 * len(labels)):
        missing -= set(anchors_of(sampler).tolist())
        if not missing:
            break
    assert not missing


def test_lone_items_beyond_their_places_take_turns_and_are_counted_once():
    labels = [*range(10), *np.repeat(np.arange(10, 15), 2)]
    with pytest.warns(UserWarning, match="have one item") as caught:
        sampler = PairSampler(labels, 4, positive_fraction=0.75)
    assert [str(warning.message) for warning in caught] == [
        "10 of 15 classes have one item: it anchors pairs of different classes only. There are "
        "too few such pairs, so 5 of these items are left out of each epoch, others each time."
    ]
    assert caught[0].filename == __file__
    epochs = [set(anchors_of(sampler).tolist()) for _ in range(4)]
    assert all(len(epoch & set(range(10))) == 5 for epoch in epochs)
    assert all(epoch >= set(range(10, 20)) for epoch in epochs)
    assert epochs[0] | epochs[1] >= set(range(10))
    assert epochs[2] | epochs[3] >= set(range(10))


def test_lone_items_that_fit_are_counted_once():
    with pytest.warns(UserWarning, match="have one item") as caught:
        PairSampler([0, 1, 1, 2, 2, 3], 2)
    assert [str(warning.message) for warning in caught] == [
        "2 of 4 classes have one item: it anchors pairs of different classes only."
    ]


def test_lone_items_of_short_or_balanced_epochs_come_less_often():
    labels = [*range(10), 10, 10, 10]
    for options in {"num_batches": 1}, {"class_balanced": True}:
        with pytest.warns(
            UserWarning, match="so these items come less often than others"
        ) as caught:
            PairSampler(labels, 4, positive_fraction=0.75, **options)
        assert len(caught) == 1


def test_lone_items_without_matching_pairs_are_nothing_to_warn_of():
    assert len(PairSampler([0, 1, 1, 2], 2, positive_fraction=0)) == 2


def observed_and_expected(labels, *, class_balanced, matching):
    labels = np.array(labels)
    sampler = PairSampler(labels, 6, class_balanced=class_balanced, num_batches=20_000, seed=1)
    anchors, partners = sides(np.concatenate(list(sampler)))
    kept = (labels[anchors] == labels[partners]) == matching
    observed = np.zeros((len(labels), len(labels)))
    np.add.at(observed, (anchors[kept], partners[kept]), 1)
    same = labels[:, None] == labels
    chance = (same & ~np.eye(len(labels), dtype=bool)) if matching else ~same
    chance = chance / (same.sum(0) if class_balanced and not matching else 1)
    chance = chance / chance.sum(1, keepdims=True)
    return observed, observed.sum(1, keepdims=True) * chance


@pytest.mark.parametrize("class_balanced", [False, True])
@pytest.mark.parametrize("matching", [False, True])
def test_partners_are_drawn_evenly(class_balanced, matching):
    labels = [5, 0, 5, -1, 5, 0, -1, 5, 0]
    observed, expected = observed_and_expected(
        labels, class_balanced=class_balanced, matching=matching
    )
    allowed = expected > 0
    assert not observed[~allowed].any()
    result = chisquare(observed[allowed], expected[allowed], ddof=len(labels) - 1)
    assert result.pvalue > 0.001


@pytest.mark.parametrize("chunk", [8, 1 << 16])
def test_matching_pairs_stand_anywhere_in_a_batch(chunk, monkeypatch):
    monkeypatch.setattr(pair_sampler, "_PAIRS_AT_ONCE", chunk)
    labels = np.arange(40) % 5
    batches = np.array(list(PairSampler(labels, 8, positive_fraction=0.25, num_batches=2000)))
    matches = labels[batches[:, 0::2]] == labels[batches[:, 1::2]]
    assert chisquare(matches.sum(0)).pvalue > 0.001


@settings(checked, max_examples=150)
@given(possible_classes())
def test_every_batch_holds_k_items_of_p_classes(options):
    sampler = quiet(ClassBalancedSampler, **options)
    labels = np.array(options["labels"])
    classes, samples = options["classes_per_batch"], options["samples_per_class"]
    enough = {label for label, size in Counter(options["labels"]).items() if size >= samples}
    for _ in range(2):
        epoch = list(sampler)
        assert len(epoch) == len(sampler)
        assert len(epoch) == (options["num_batches"] or -(-len(labels) // (classes * samples)))
        draws = Counter()
        dealt = {label: [] for label in enough}
        for batch in epoch:
            assert len(set(batch)) == len(batch) == sampler.batch_size == classes * samples
            assert all(type(index) is int for index in batch)
            held = Counter(labels[batch].tolist())
            assert len(held) == classes
            assert set(held.values()) == {samples}
            draws.update(held.keys())
            for index in batch:
                dealt[int(labels[index])].append(index)
        assert spread(draws[label] for label in enough) <= 1
        for label, items in dealt.items():
            size = int((labels == label).sum())
            decks = [items[start : start + size] for start in range(0, len(items), size)]
            assert all(len(set(deck)) == len(deck) for deck in decks)


@checked
@given(any_classes())
def test_exactly_too_few_classes_are_refused(options):
    sizes = Counter(options["labels"]).values()
    enough = sum(size >= options["samples_per_class"] for size in sizes)
    if enough >= options["classes_per_batch"]:
        quiet(ClassBalancedSampler, **options)
    else:
        with pytest.raises(ValueError, match=f"`classes_per_batch` is .* only {enough} of"):
            quiet(ClassBalancedSampler, **options)


def test_classes_take_turns_over_short_epochs():
    labels = np.arange(44) % 11
    sampler = ClassBalancedSampler(labels, 3, 2, num_batches=1)
    epochs = [set(labels[batch].tolist()) for batch in islice(stream(sampler), 4)]
    assert set.union(*epochs) == set(range(11))


def test_classes_with_too_few_items_are_left_out_and_counted_once():
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    with pytest.warns(UserWarning, match="are left out") as caught:
        sampler = ClassBalancedSampler(labels, 2, 3)
    assert [str(warning.message) for warning in caught] == [
        "2 of 4 classes have fewer than 3 items: these 3 items are left out."
    ]
    assert caught[0].filename == __file__
    assert {labels[index] for batch in sampler for index in batch} == {0, 2}


LABELS = [3, 3, 3, -1, -1, 7, 7, 7, 7, 0, 0, 0, 5]
SAMPLERS = {
    "pairs": (PairSampler, {"pairs_per_batch": 3}),
    "matching pairs": (PairSampler, {"pairs_per_batch": 3, "positive_fraction": 1}),
    "other pairs": (PairSampler, {"pairs_per_batch": 4, "positive_fraction": 0}),
    "balanced pairs": (PairSampler, {"pairs_per_batch": 3, "class_balanced": True}),
    "pairs of a short epoch": (PairSampler, {"pairs_per_batch": 3, "num_batches": 2}),
    "pairs of a long epoch": (PairSampler, {"pairs_per_batch": 3, "num_batches": 11}),
    "classes": (ClassBalancedSampler, {"classes_per_batch": 2, "samples_per_class": 2}),
    "classes of a short epoch": (
        ClassBalancedSampler,
        {"classes_per_batch": 1, "samples_per_class": 3, "num_batches": 2},
    ),
    "classes of a long epoch": (
        ClassBalancedSampler,
        {"classes_per_batch": 3, "samples_per_class": 2, "num_batches": 9},
    ),
}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def sampler_of(name, labels=LABELS, **more):
    make, options = SAMPLERS[name]
    return quiet(make, labels, **options, **more)


@each_sampler
def test_seed_and_epoch_decide_everything(name):
    sampler = sampler_of(name, seed=3)
    first, second = list(sampler), list(sampler)
    assert first != second
    again = sampler_of(name, seed=3)
    assert [list(again), list(again)] == [first, second]
    assert list(sampler_of(name, seed=4)) != first


@each_sampler
def test_global_random_state_is_neither_used_nor_changed(name):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = list(sampler_of(name))
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert list(sampler_of(name)) == first


@each_sampler
def test_set_epoch_goes_to_the_start_of_any_epoch(name):
    sampler = sampler_of(name)
    epochs = [list(sampler) for _ in range(4)]
    for epoch in 2, 0, 3, 3, 1:
        sampler.set_epoch(epoch)
        next(iter(sampler))
        sampler.set_epoch(epoch)
        assert sampler.state_dict() == {"seed": 0, "epoch": epoch, "batch": 0}
        assert list(sampler) == epochs[epoch]
        assert sampler.state_dict() == {"seed": 0, "epoch": epoch + 1, "batch": 0}


@each_sampler
@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 16])
def test_state_continues_with_the_very_next_batch_from_every_position(name, chunk, monkeypatch):
    monkeypatch.setattr(pair_sampler, "_PAIRS_AT_ONCE", chunk)
    length = len(sampler_of(name))
    expected = list(islice(stream(sampler_of(name, seed=2)), 4 * length))
    for position in range(2 * length + 2):
        before = sampler_of(name, seed=2)
        assert list(islice(stream(before), position)) == expected[:position]
        state = json.loads(json.dumps(before.state_dict()))
        assert state == {"seed": 2, "epoch": position // length, "batch": position % length}
        after = sampler_of(name, seed=9)
        after.load_state_dict(state)
        assert list(islice(stream(after), 4 * length - position)) == expected[position:]
        assert list(islice(stream(before), 4 * length - position)) == expected[position:]


@each_sampler
def test_epoch_that_was_taken_batch_by_batch_is_over(name):
    sampler = sampler_of(name)
    batches = iter(sampler)
    for _ in range(len(sampler)):
        next(batches)
    following = list(sampler)
    assert len(following) == len(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == following


@each_sampler
def test_state_at_the_end_of_an_epoch_is_the_start_of_the_next(name):
    sampler = sampler_of(name)
    sampler.load_state_dict({"seed": 0, "epoch": 4, "batch": len(sampler)})
    assert sampler.state_dict() == {"seed": 0, "epoch": 5, "batch": 0}
    assert len(list(sampler)) == len(sampler)


@each_sampler
def test_length_is_the_whole_epoch_in_the_middle_of_one_too(name):
    sampler = sampler_of(name)
    length = len(sampler)
    next(iter(sampler))
    assert len(sampler) == length
    assert len(list(sampler)) == length - 1
    assert len(list(sampler)) == length


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["pairs", "balanced pairs", "classes"])
def test_samplers_work_in_a_data_loader(name, num_workers):
    dataset = [(torch.tensor(index), label) for index, label in enumerate(LABELS)]
    loader = DataLoader(dataset, batch_sampler=sampler_of(name), num_workers=num_workers)
    expected = sampler_of(name)
    assert len(loader) == len(expected)
    for _ in range(2):
        loaded = list(loader)
        epoch = list(expected)
        assert [indices.tolist() for indices, _ in loaded] == epoch
        assert [labels.tolist() for _, labels in loaded] == [[LABELS[i] for i in b] for b in epoch]


@each_sampler
@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        np.array,
        torch.tensor,
        lambda x: np.array(x, np.int8),
        lambda x: torch.tensor(x).int(),
    ],
)
def test_labels_may_be_any_integers(name, convert):
    assert list(sampler_of(name, convert(LABELS))) == list(sampler_of(name))


@each_sampler
def test_only_which_labels_are_equal_matters(name):
    rank = np.unique(LABELS, return_inverse=True)[1]
    names = np.array([-(2**63), -5, 2**53, 2**53 + 1, 2**63 - 1])
    assert list(sampler_of(name, names[rank])) == list(sampler_of(name))


@pytest.mark.parametrize(
    "batch", [list(range(6)), np.arange(6), torch.arange(6), torch.arange(6.0).reshape(6, 1)]
)
def test_split_takes_the_sides_apart(batch):
    anchors, partners = PairSampler.split(batch)
    assert type(anchors) is type(partners) is type(batch)
    assert np.asarray(list(anchors)).ravel().tolist() == [0, 2, 4]
    assert np.asarray(list(partners)).ravel().tolist() == [1, 3, 5]


def test_split_of_an_odd_number_of_rows_is_an_error():
    with pytest.raises(ValueError, match="`batch` must hold pairs, an even number of rows, got 5"):
        PairSampler.split(torch.arange(5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pairs_per_batch": 0}, ValueError, "`pairs_per_batch` must be at least 1, got 0"),
        ({"pairs_per_batch": 2.0}, TypeError, "`pairs_per_batch` must be an integer, got 2.0"),
        ({"pairs_per_batch": True}, TypeError, "`pairs_per_batch` must be an integer, got True"),
        ({"pairs_per_batch": 7}, ValueError, "at most the number of items, got 7 for 6 items"),
        (
            {"positive_fraction": 1.1},
            ValueError,
            r"`positive_fraction` must be in \[0, 1\], got 1.1",
        ),
        ({"positive_fraction": "1"}, TypeError, "`positive_fraction` must be a number, got '1'"),
        (
            {"positive_fraction": 0.1},
            ValueError,
            "`positive_fraction` 0.1 of 2 pairs per batch rounds to 0. Take more pairs per batch",
        ),
        ({"positive_fraction": 0.9}, ValueError, "0.9 of 2 pairs per batch rounds to 2"),
        ({"num_batches": 0}, ValueError, "`num_batches` must be at least 1, got 0"),
        ({"num_batches": 1.5}, TypeError, "`num_batches` must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "`seed` must not be negative, got -1"),
        ({"seed": None}, TypeError, "`seed` must be an integer, got None"),
        (
            {"labels": [4] * 6},
            ValueError,
            "`labels` has one class alone, .* `positive_fraction` to 1",
        ),
        ({"labels": range(6)}, ValueError, "no class with two items, .* `positive_fraction` to 0"),
        (
            {"labels": [0, 0, 1, 2, 3, 4], "pairs_per_batch": 4, "positive_fraction": 0.75},
            ValueError,
            "3 matching pairs per batch need as many anchors, but only 2 .*`class_balanced=True`",
        ),
        ({"labels": []}, ValueError, "`labels` must have at least one item, got none"),
        ({"labels": ["cat", "dog"]}, TypeError, "`labels` must be integers, got <U3.*numpy.unique"),
        ({"labels": [0.0, 1.0]}, TypeError, "`labels` must be integers, got float64"),
        ({"labels": torch.zeros(4)}, TypeError, "`labels` must be integers, got float32"),
        (
            {"labels": np.eye(3, dtype=int)},
            ValueError,
            r"`labels` must have .*\[3, 3\].*argmax\(1\)",
        ),
        ({"labels": 3}, TypeError, r"`labels` must be a list, an array or a tensor, .* got int"),
        ({"shuffle": True}, TypeError, "shuffle"),
    ],
)
def test_wrong_arguments_of_the_pair_sampler_are_errors_that_name_them(options, error, message):
    with pytest.raises(error, match=message):
        PairSampler(**({"labels": [0, 0, 0, 1, 1, 1], "pairs_per_batch": 2} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes_per_batch": 0}, ValueError, "`classes_per_batch` must be at least 1, got 0"),
        ({"classes_per_batch": 1.0}, TypeError, "`classes_per_batch` must be an integer, got 1.0"),
        ({"samples_per_class": -2}, ValueError, "`samples_per_class` must be at least 1, got -2"),
        ({"samples_per_class": "2"}, TypeError, "`samples_per_class` must be an integer, got '2'"),
        ({"num_batches": 0}, ValueError, "`num_batches` must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "`seed` must not be negative, got -1"),
        (
            {"classes_per_batch": 3},
            ValueError,
            "`classes_per_batch` is 3, but only 2 of 2 classes have the 2 items that",
        ),
        ({"samples_per_class": 4}, ValueError, "only 0 of 2 classes have the 4 items that"),
        ({"labels": []}, ValueError, "`labels` must have at least one item, got none"),
        ({"labels": ["cat", "dog"]}, TypeError, "`labels` must be integers, got <U3"),
        ({"labels": torch.eye(3).int()}, ValueError, r"`labels` must have shape \[N\].*\[3, 3\]"),
    ],
)
def test_wrong_arguments_of_the_class_sampler_are_errors_that_name_them(options, error, message):
    usual = {"labels": [0, 0, 0, 1, 1, 1], "classes_per_batch": 2, "samples_per_class": 2}
    with pytest.raises(error, match=message):
        ClassBalancedSampler(**(usual | options))


@each_sampler
@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            {"seed": 0, "epoch": 0},
            ValueError,
            r"keys seed, epoch and batch, got \['epoch', 'seed'\]",
        ),
        ({"seed": 0, "epoch": 0, "batch": 0, "rank": 0}, ValueError, "`state` must have the keys"),
        (
            {"seed": 0, "epoch": 0, "batch": 99},
            ValueError,
            "`state` is at batch 99, but an epoch has",
        ),
        ({"seed": 0, "epoch": -1, "batch": 0}, ValueError, "`epoch` must not be negative, got -1"),
        ({"seed": 0, "epoch": 0, "batch": 0.5}, TypeError, "`batch` must be an integer, got 0.5"),
    ],
)
def test_wrong_state_is_an_error_and_changes_nothing(name, state, error, message):
    sampler = sampler_of(name)
    with pytest.raises(error, match=message):
        sampler.load_state_dict(state)
    assert list(sampler) == list(sampler_of(name))


@pytest.mark.parametrize(
    ("epoch", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)]
)
def test_wrong_epoch_is_an_error(epoch, error):
    with pytest.raises(error, match="`epoch` must"):
        sampler_of("pairs").set_epoch(epoch)


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: PairSampler(labels, 64),
        lambda labels: PairSampler(labels, 64, class_balanced=True),
        lambda labels: ClassBalancedSampler(labels, 32, 4),
    ],
    ids=["pairs", "balanced pairs", "classes"],
)
def test_a_million_labels_take_seconds(make):
    labels = np.random.default_rng(0).integers(0, 1000, 1_000_000)
    start = time.perf_counter()
    sampler = make(labels)
    assert sum(1 for _ in sampler) == len(sampler)
    assert time.perf_counter() - start < 15


def test_the_example_of_the_decks_is_right():
    failed, attempted = doctest.testmod(decks)
    assert attempted > 3
    assert not failed


@pytest.mark.parametrize(
    ("counts", "most", "multiple_of", "expected"),
    [
        ([6, 6, 6], 256, 1, 18),
        ([6, 6, 6], 256, 4, 12),  # 16 would be 4 classes of 4
        ([30, 30, 1], 256, 1, 60),  # a class of one image is in no such batch
        ([40, 3], 256, 1, 42),  # equally many would be 6
        ([100, 100, 100], 256, 1, 252),
        ([100, 100, 100], 128, 8, 128),
        ([1, 1], 256, 4, 4),
    ],
)
def test_few_images_make_the_largest_batch_of_equally_many(
    counts: list[int], most: int, multiple_of: int, expected: int
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert batch_size_within(labels, most, multiple_of) == expected
