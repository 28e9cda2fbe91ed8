"""Thresholds, against counting all pairs; and their intervals, on classes that were not seen."""

import numpy as np
import pytest
import torch

from pairclip import choose_threshold
from pairclip.evaluation import Threshold


def sample(classes: int, of_each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes in families, some of which are much alike."""
    generator = torch.Generator().manual_seed(seed)
    families = torch.randn(classes // 4, 16, generator=generator)
    centres = 0.7 * torch.randn(classes, 16, generator=generator)
    centres += families[torch.randint(len(families), (classes,), generator=generator)]
    labels = torch.arange(classes * of_each) % classes
    noise = torch.randn(len(labels), 16, generator=generator)
    return centres[labels] + noise, labels


def cosines(rows: torch.Tensor) -> np.ndarray:
    unit = torch.nn.functional.normalize(rows.double())
    return (unit @ unit.T).numpy()


def equal(one: Threshold, other: Threshold) -> bool:
    return all(
        np.array_equal(value, getattr(other, name), equal_nan=True)
        for name, value in vars(one).items()
    )


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.3])
def test_rates_are_those_of_all_pairs_counted(rate: float) -> None:
    rows, labels = sample(12, 10)
    labels = 3 * labels - 5
    labels[0] = 99  # alone
    chosen = choose_threshold(rows.double(), labels, false_match_rate=rate)
    scores = cosines(rows)
    same = (labels[:, None] == labels).numpy()
    pairs = ~np.eye(len(rows), dtype=bool)
    called = scores >= chosen.threshold
    false_rate = called[~same].mean()
    assert chosen.false_match_rate == pytest.approx(false_rate, abs=1e-12)
    assert false_rate <= rate
    assert (scores >= chosen.threshold - 4e-6)[~same].mean() > rate - 2 / (~same).sum()
    assert chosen.match_rate == pytest.approx(called[same & pairs].mean(), abs=1e-12)
    np.testing.assert_array_equal(chosen.classes, labels.unique())
    for place, name in enumerate(chosen.classes):
        mine = (labels == name).numpy()
        expected = called[mine][:, mine][pairs[mine][:, mine]]
        if len(expected):
            assert chosen.class_match_rates[place] == pytest.approx(expected.mean())
        else:
            assert np.isnan(chosen.class_match_rates[place])
        expected = called[mine][:, ~mine].mean()
        assert chosen.class_false_match_rates[place] == pytest.approx(expected)
    assert chosen.interval[0] <= chosen.threshold <= chosen.interval[1]
    assert chosen.false_match_interval[0] <= rate <= chosen.false_match_interval[1]


@pytest.mark.parametrize(("classes", "of_each"), [(48, 6), (10, 20)])
def test_the_rate_on_other_classes_lies_in_its_interval(
    classes: int, of_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairclip.evaluation.thresholds._RESAMPLES", 500)
    rows, labels = sample(classes, of_each)
    scores = cosines(rows)
    different = (labels[:, None] != labels).numpy()
    inside = []
    for seed in range(25):
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
        half = order[: classes // 2]
        ours = torch.isin(labels, half)
        chosen = choose_threshold(rows[ours], labels[ours], false_match_rate=0.02)
        others = np.ix_(~ours, ~ours)
        realised = (scores[others] >= chosen.threshold)[different[others]].mean()
        low, high = chosen.false_match_interval
        inside.append(low <= realised <= high)
        assert high < (0.5 if classes > 10 else 1)
    assert np.mean(inside) >= 0.9


def test_seeds_decide_the_intervals_alone() -> None:
    rows, labels = sample(20, 6)
    chosen = choose_threshold(rows, labels)
    assert equal(choose_threshold(rows.numpy(), labels.numpy()), chosen)
    other = choose_threshold(rows, labels, seed=1)
    assert other.threshold == chosen.threshold
    assert other.interval != chosen.interval
    np.testing.assert_allclose(other.interval, chosen.interval, atol=0.05)


def test_many_classes_are_drawn_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = sample(60, 4)
    each = choose_threshold(rows, labels)
    monkeypatch.setattr("pairclip.evaluation.thresholds._MOST_GROUPS", 30)
    grouped = choose_threshold(rows, labels)
    assert (grouped.threshold, grouped.match_rate) == (each.threshold, each.match_rate)
    np.testing.assert_allclose(grouped.class_match_rates, each.class_match_rates)
    np.testing.assert_allclose(grouped.interval, each.interval, atol=0.1)


def test_a_collapsed_tower_has_no_threshold_that_matches() -> None:
    chosen = choose_threshold(torch.ones(60, 4), torch.arange(60) % 3)
    assert (chosen.false_match_rate, chosen.match_rate) == (0, 0)
    assert chosen.threshold > 1


def test_wrong_arguments_are_named() -> None:
    rows, labels = sample(8, 4)
    for rate in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"`false_match_rate` must be in \(0, 1\), got"):
            choose_threshold(rows, labels, false_match_rate=rate)
    with pytest.raises(TypeError, match="`false_match_rate` must be a number, got '1 %'"):
        choose_threshold(rows, labels, false_match_rate="1 %")
    with pytest.raises(ValueError, match=r"is less than one of the \d+ pairs of different classes"):
        choose_threshold(rows, labels, false_match_rate=1e-9)
    with pytest.raises(ValueError, match="at least three classes, and one of two rows, got 2"):
        choose_threshold(rows, labels % 2)
    with pytest.raises(ValueError, match="8 classes and 0 pairs of one class"):
        choose_threshold(rows[:8], labels[:8])
    with pytest.raises(ValueError, match="`seed` must not be negative"):
        choose_threshold(rows, labels, seed=-1)
