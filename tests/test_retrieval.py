"""Retrieval figures, against scikit-learn, pytorch-metric-learning and enumeration of ties."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from pairclip import knn_accuracy, mean_average_precision, recall_at_k, retrieval


def sample(count: int = 120, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return torch.randn(count, 6, generator=generator), labels


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).numpy()


def test_precision_at_one_is_that_of_pytorch_metric_learning() -> None:
    rows, labels = sample()
    calculator = AccuracyCalculator(
        include=("precision_at_1",), k=1, knn_func=CustomKNN(CosineSimilarity())
    )
    expected = calculator.get_accuracy(rows, labels)["precision_at_1"]
    assert recall_at_k(rows, labels) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [1, 5, 10, 500])
def test_recall_is_the_share_of_queries_with_a_hit(k: int) -> None:
    rows, labels = sample(classes=40)
    scores = cosines(rows, rows)
    np.fill_diagonal(scores, -np.inf)
    hits = []
    with pytest.warns(UserWarning, match="queries were left out") if alone(labels) else nothing():
        found = recall_at_k(rows, labels, k=k)
    for i in range(len(rows)):
        relevant = (labels == labels[i]).numpy()
        if relevant.sum() > 1:
            nearest = np.argsort(-scores[i])[: min(k, len(rows) - 1)]
            hits.append(relevant[nearest].any())
    assert found == pytest.approx(np.mean(hits))


def alone(labels: torch.Tensor) -> int:
    return int((labels.unique(return_counts=True)[1] == 1).sum())


class nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_average_precision_is_that_of_scikit_learn() -> None:
    rows, labels = sample()
    scores = cosines(rows, rows)
    others = ~np.eye(len(rows), dtype=bool)
    expected = [
        average_precision_score((labels == labels[i]).numpy()[others[i]], scores[i][others[i]])
        for i in range(len(rows))
    ]
    assert mean_average_precision(rows, labels) == pytest.approx(np.mean(expected), abs=1e-9)


def test_a_separate_gallery_is_searched_whole() -> None:
    items, labels = sample(60)
    queries, query_labels = sample(30, seed=1)
    scores = cosines(queries, items)
    relevant = (query_labels[:, None] == labels).numpy()
    expected = [average_precision_score(r, s) for r, s in zip(relevant, scores, strict=True)]
    found = mean_average_precision(items, labels, queries=queries, query_labels=query_labels)
    assert found == pytest.approx(np.mean(expected), abs=1e-9)
    hits = relevant[np.arange(30)[:, None], np.argsort(-scores)[:, :3]].any(1)
    found = recall_at_k(items, labels, k=3, queries=queries, query_labels=query_labels)
    assert found == pytest.approx(hits.mean())


def test_votes_are_those_of_scikit_learn() -> None:
    rows, labels = sample(200, classes=2)
    test, test_labels = sample(50, classes=2, seed=1)
    oracle = KNeighborsClassifier(5, metric="cosine").fit(rows, labels)
    expected = oracle.score(test, test_labels)
    assert knn_accuracy(rows, labels, test, test_labels, k=5) == pytest.approx(expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=2, max_size=6),
    relevant=st.integers(1, 63),
)
def test_ties_count_as_their_mean_over_all_orders(scores: list[float], relevant: int) -> None:
    scores = sorted(scores, reverse=True)
    count = len(scores)
    flags = [bool(relevant >> i & 1) for i in range(count)]
    if not any(flags):
        flags[0] = True
    precisions, hits = [], []
    for order in itertools.permutations(range(count)):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        ranked = np.array([flags[i] for i in order])
        precision = ranked.cumsum() / np.arange(1, count + 1)
        precisions.append(precision[ranked].mean())
        hits.append([ranked[:k].any() for k in range(1, count + 2)])
    tensor, found = torch.tensor([scores]), torch.tensor([flags])
    ties = retrieval._ties(tensor)
    assert float(retrieval._average_precision(found, ties)) == pytest.approx(np.mean(precisions))
    chances = [float(retrieval._hit(found, ties, k)) for k in range(1, count + 2)]
    np.testing.assert_allclose(chances, np.mean(hits, axis=0), atol=1e-9)


def test_a_collapsed_tower_gets_chance_whatever_the_order_of_the_rows() -> None:
    rows = torch.zeros(40, 4)
    rows[:, 0] = 1
    labels = torch.arange(40) // 10
    figures = {
        (recall_at_k(rows, order), mean_average_precision(rows, order))
        for order in (labels, labels.flip(0), labels[torch.randperm(40)])
    }
    assert len({(round(a, 9), round(b, 9)) for a, b in figures}) == 1
    assert recall_at_k(rows, labels) == pytest.approx(9 / 39)
    assert knn_accuracy(rows, labels, rows, labels, k=1) == pytest.approx(1 / 4)


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = sample()
    whole = retrieval.per_query(rows, labels, ks=(1, 5), neighbors=3)
    monkeypatch.setattr(retrieval, "_BLOCK_CELLS", 7 * len(rows))
    blocks = retrieval.per_query(rows, labels, ks=(1, 5), neighbors=3)
    for expected, found in zip(whole, blocks, strict=True):
        torch.testing.assert_close(found, expected)


def test_queries_without_another_of_their_class_are_left_out_and_counted() -> None:
    rows, _ = sample(5)
    with pytest.warns(UserWarning, match="1 of 5 queries were left out") as caught:
        recall_at_k(rows, [0, 0, 1, 1, 2])
    assert len(caught) == 1
    with pytest.raises(ValueError, match="None of the 5 queries has another item of its class"):
        recall_at_k(rows, torch.arange(5))
    with pytest.raises(ValueError, match="None of the 1 queries"):
        mean_average_precision(rows[:1], [0])


def test_wrong_arguments_are_named() -> None:
    rows, labels = sample(10)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        recall_at_k(rows, labels, k=0)
    with pytest.raises(TypeError, match=r"`k` must be an integer, got 1\.5"):
        recall_at_k(rows, labels, k=1.5)
    with pytest.raises(ValueError, match="`queries` and `query_labels` go together"):
        recall_at_k(rows, labels, queries=rows)
    with pytest.raises(ValueError, match="`queries` must have embedding size 6, got 3"):
        recall_at_k(rows, labels, queries=rows[:, :3], query_labels=labels)
    with pytest.raises(ValueError, match="`query_labels` must have one label per row"):
        recall_at_k(rows, labels, queries=rows, query_labels=labels[:3])
    with pytest.raises(ValueError, match="`k` must be at most the number of items, got 11 for 10"):
        knn_accuracy(rows, labels, rows, labels, k=11)
    with pytest.raises(ValueError, match="Turn one-hot rows into class ids"):
        mean_average_precision(rows, torch.eye(10))
    with pytest.raises(ValueError, match="`test` must have at least one row, got none"):
        knn_accuracy(rows, labels, rows[:0], [], k=1)
    with pytest.raises(ValueError, match="`train_labels` must have one label per row"):
        knn_accuracy(rows, labels[1:], rows, labels, k=1)
    rows[3] = float("inf")
    with pytest.raises(ValueError, match="`embeddings` has NaN or infinite values in 1 of 10"):
        recall_at_k(rows, labels)
