"""Separation of pairs, against scikit-learn and NumPy over the list of all pairs."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pairclip.retrieval import (
    QUERY_METRICS,
    PairSeparation,
    blocks,
    outcome_of,
    pair_counts,
    pair_metrics,
    pair_separation,
)

RANKED = (
    "roc_auc",
    "roc_auc_error",
    "average_precision",
    "average_precision_error",
    "best_threshold",
    "balanced_accuracy",
    "balanced_accuracy_error",
)


def sample(
    count: int = 150, noise: float = 2.0, classes: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 8, generator=generator)
    return centres[labels] + noise * torch.randn(count, 8, generator=generator), labels


def pairs_of(rows: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of every pair, float64, and whether it is of one class."""
    unit = torch.nn.functional.normalize(rows.double())
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    return (unit @ unit.T)[i, j].numpy(), (labels[i] == labels[j]).numpy()


def best_accuracy(same: np.ndarray, scores: np.ndarray) -> float:
    false_rate, true_rate, _ = roc_curve(same, scores, drop_intermediate=False)
    return float(((true_rate + 1 - false_rate) / 2).max())


def assert_within_bounds(found: PairSeparation, scores: np.ndarray, same: np.ndarray) -> None:
    auc, precision = roc_auc_score(same, scores), average_precision_score(same, scores)
    assert abs(found.roc_auc - auc) <= found.roc_auc_error + 1e-12
    assert abs(found.average_precision - precision) <= found.average_precision_error + 1e-12
    gain = best_accuracy(same, scores) - found.balanced_accuracy
    assert -1e-12 <= gain <= found.balanced_accuracy_error + 1e-12


def test_metrics_are_those_of_scikit_learn_and_numpy() -> None:
    rows, labels = sample()
    scores, same = pairs_of(rows, labels)
    found = pair_separation(rows.double(), labels)
    assert_within_bounds(found, scores, same)
    assert found.roc_auc_error < 1e-5
    assert found.average_precision_error < 1e-4
    assert found.balanced_accuracy_error < 1e-3
    assert found.same_mean == pytest.approx(scores[same].mean(), abs=1e-12)
    assert found.different_mean == pytest.approx(scores[~same].mean(), abs=1e-12)
    assert found.gap == found.same_mean - found.different_mean
    assert found.same_std == pytest.approx(scores[same].std(), abs=1e-6)
    assert found.different_std == pytest.approx(scores[~same].std(), abs=1e-6)
    assert (found.num_same, found.num_different) == (same.sum(), (~same).sum())
    called_same = scores >= found.best_threshold
    accuracy = (called_same[same].mean() + (~called_same[~same]).mean()) / 2
    assert found.balanced_accuracy == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("width", [0.001, 0.02, 0.5])
def test_bounds_hold_and_are_needed_in_wide_bins(width: float) -> None:
    rows, labels = sample()
    search = blocks.prepare(rows.double(), labels)
    counts = pair_counts.PairCounts(search, -1.0, width)
    counts.add_all(search.rows())
    found = pair_metrics._separation(search, counts)
    scores, same = pairs_of(rows, labels)
    assert_within_bounds(found, scores, same)
    assert 0 < found.roc_auc_error < width
    assert 0 < found.average_precision_error < width
    assert abs(found.same_std - scores[same].std()) <= width / 2


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_a_nearly_collapsed_tower_is_measured_in_finer_bins(spread: float) -> None:
    rows, labels = sample()
    rows = (torch.ones(8) + spread * rows).double()
    scores, same = pairs_of(rows, labels)
    found = pair_separation(rows, labels)
    assert_within_bounds(found, scores, same)
    assert found.roc_auc_error < 1e-5
    assert found.average_precision_error < 1e-4
    assert found.same_std == pytest.approx(scores[same].std(), rel=1e-4)
    assert found.best_threshold == pytest.approx(scores.mean(), abs=5 * scores.std())
    # In float32, ties are all that there is between bins: nothing is uncertain.
    assert pair_separation(rows.float(), labels).roc_auc_error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1.0, "orthogonal"])
def test_pairs_of_one_similarity_are_tied_and_seen_at_once(
    value: float | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        torch.eye(6, dtype=dtype) if value == "orthogonal" else torch.full((6, 3), value).to(dtype)
    )
    passes = []
    add_all = pair_counts.PairCounts.add_all
    monkeypatch.setattr(
        pair_counts.PairCounts, "add_all", lambda *given: passes.append(1) or add_all(*given)
    )
    separation = pair_separation(rows, [0, 0, 0, 1, 1, 1])
    assert len(passes) == 1
    assert (separation.roc_auc, separation.balanced_accuracy) == (0.5, 0.5)
    assert (separation.same_std, separation.different_std) == (0, 0)
    assert [getattr(separation, name) for name in RANKED if name.endswith("error")] == [0, 0, 0]


@pytest.mark.parametrize("scale", [1e-12, 1e-100, 1e-250])
def test_similarities_close_to_zero_are_told_apart(scale: float) -> None:
    rows = torch.zeros(4, 5, dtype=torch.float64)
    rows[:, 1:].fill_diagonal_(1)
    rows[:, 0] = torch.tensor([1, 2, -3, -4]) * scale**0.5
    scores, same = pairs_of(rows, torch.tensor([0, 0, 1, 1]))
    separation = pair_separation(rows, [0, 0, 1, 1])
    assert separation.roc_auc == roc_auc_score(same, scores)
    assert separation.roc_auc_error < 1e-4


@pytest.mark.parametrize("length", [1e-310, 1e-200, 1e-160, 1.0, 1e160, 1e300])
def test_rows_of_any_length_are_the_same_pairs(length: float) -> None:
    rows, labels = sample(40)
    rows = rows.double()
    expected = pair_separation(rows, labels)
    separation = pair_separation(rows * length, labels)
    assert separation.roc_auc == pytest.approx(expected.roc_auc, abs=1e-6)
    assert separation.same_mean == pytest.approx(expected.same_mean, abs=1e-6)


def test_ties_count_as_chance() -> None:
    # Cosines are 0 for four pairs and 1 for two, one of either kind.
    rows = torch.tensor([[1.0, 0], [2.0, 0], [0, 1.0], [0, 1.0]])
    labels = torch.tensor([0, 0, 0, 1])
    found = pair_separation(rows, labels)
    scores, same = pairs_of(rows, labels)
    orders = [
        same[[*order]]
        for order in itertools.permutations(range(6))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    precisions = [(order.cumsum() / np.arange(1, 7))[order].mean() for order in orders]
    assert found.average_precision == pytest.approx(np.mean(precisions), abs=1e-12)
    assert found.roc_auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert found.balanced_accuracy == pytest.approx(best_accuracy(same, scores), abs=1e-12)


def test_separated_pairs_have_a_threshold_midway() -> None:
    rows = torch.tensor([[1.0, 0], [4.0, 3.0], [-1.0, 0], [-4.0, -3.0]])
    found = pair_separation(rows, [0, 0, 1, 1])
    assert (found.roc_auc, found.balanced_accuracy, found.average_precision) == (1, 1, 1)
    assert found.balanced_accuracy_error == 0
    assert found.best_threshold == pytest.approx((0.8 - 0.8) / 2, abs=1e-5)
    # Opposite rows: -1 and 1 themselves have their bins.
    found = pair_separation(rows[[0, 0, 2, 2]], [0, 0, 1, 1])
    assert (found.same_mean, found.different_mean, found.roc_auc) == (1, -1, 1)


def test_a_kind_of_pair_that_is_not_there_has_no_metrics() -> None:
    rows, _ = sample(6)
    found = pair_separation(rows, [3] * 6)
    assert np.isnan([getattr(found, name) for name in (*RANKED, "different_mean", "gap")]).all()
    assert (found.num_same, found.num_different) == (15, 0)
    assert found.same_mean == pytest.approx(pairs_of(rows, torch.zeros(6))[0].mean(), abs=1e-6)
    found = pair_separation(rows, range(6))
    assert np.isnan([getattr(found, name) for name in (*RANKED, "same_mean", "same_std")]).all()
    assert (found.num_same, found.num_different) == (0, 15)
    assert pair_separation(rows[:1], [0]).num_same == 0
    assert pair_separation(rows[:0], []).num_different == 0


def test_one_pair_among_thousands_has_its_own_mean() -> None:
    rows, _ = sample(3000)
    labels = torch.arange(3000)
    labels[2999] = 0
    expected = torch.nn.functional.cosine_similarity(rows[0], rows[2999], dim=0)
    assert pair_separation(rows, labels).same_mean == pytest.approx(float(expected), abs=1e-6)


def test_pairs_are_counted_in_the_same_pass_and_once() -> None:
    rows, labels = sample(700)
    labels[4] = 9
    with pytest.warns(UserWarning, match="1 of 700 queries were left out"):
        found = outcome_of([*QUERY_METRICS.values()], rows, labels)
    alone = pair_separation(rows, labels)
    assert found.separation is not None
    assert found.separation.roc_auc == pytest.approx(alone.roc_auc, abs=1e-6)
    scores, same = pairs_of(rows, labels)
    assert (alone.num_same, alone.num_different) == (same.sum(), (~same).sum())
    assert found.histogram is not None
    edges, of_same, of_different = (part.numpy() for part in found.histogram)
    np.testing.assert_allclose(edges, np.linspace(-1, 1, 201), atol=1e-12)
    # Single pairs may be on the other side of an edge.
    np.testing.assert_allclose(of_same, np.histogram(scores[same], edges)[0], atol=3)
    np.testing.assert_allclose(of_different, np.histogram(scores[~same], edges)[0], atol=3)
    assert (of_same.sum(), of_different.sum()) == (same.sum(), (~same).sum())


def test_queries_and_gallery_are_paired() -> None:
    rows, labels = sample(90)
    items, queries = slice(0, 60), slice(60, 90)
    found = outcome_of(
        [*QUERY_METRICS.values()],
        rows[items],
        labels[items],
        queries=rows[queries],
        query_labels=labels[queries],
    ).separation
    assert found is not None
    unit = torch.nn.functional.normalize(rows.double())
    scores = (unit[queries] @ unit[items].T).flatten().numpy()
    same = (labels[queries, None] == labels[items]).flatten().numpy()
    assert found.roc_auc == pytest.approx(roc_auc_score(same, scores), abs=1e-5)
    assert found.same_mean == pytest.approx(scores[same].mean(), abs=1e-6)
    assert found.different_mean == pytest.approx(scores[~same].mean(), abs=1e-6)


def test_wrong_arguments_are_named() -> None:
    rows, labels = sample(10)
    with pytest.raises(ValueError, match="`labels` must have one label per row, got 9 labels"):
        pair_separation(rows, labels[1:])
    rows[3] = float("nan")
    with pytest.raises(ValueError, match="`embeddings` has NaN or infinite values in 1 of 10 rows"):
        pair_separation(rows, labels)
