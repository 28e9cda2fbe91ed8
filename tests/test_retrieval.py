"""Retrieval metrics, against scikit-learn, pytorch-metric-learning and enumeration of ties."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from pairclip import _checks
from pairclip.retrieval import (
    METRICS,
    QUERY_METRICS,
    Outcome,
    blocks,
    knn_accuracy,
    map_at_r,
    mean_average_precision,
    outcome_of,
    precision_at_k,
    r_precision,
    ranks as ranking,
    recall_at_k,
    retrieval_figures,
)
from pairclip.retrieval.table import precision, recall

try:
    from pytorch_metric_learning.evaluation import AccuracyCalculator, CustomKNN
except ImportError:  # before version 3
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

FUNCTIONS = (recall_at_k, precision_at_k, r_precision, map_at_r, mean_average_precision)


def sample(count: int = 120, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return torch.randn(count, 6, generator=generator), labels


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2).numpy()


def alone(labels: torch.Tensor) -> int:
    return int((labels.unique(return_counts=True)[1] == 1).sum())


def every_metric(rows: Any, labels: Any, **options: Any) -> Outcome:
    return outcome_of([*QUERY_METRICS.values()], rows, labels, **options)


def assert_outcomes_equal(outcome: Outcome, expected: Outcome, **tolerances: float) -> None:
    torch.testing.assert_close(outcome[:4], expected[:4], **tolerances)


def assert_queries_equal(outcome: Outcome, other: Outcome, order: torch.Tensor) -> None:
    """The queries of `outcome` are those of `other` in another order."""
    for name, values in other.per_query.items():
        if name != "knn_accuracy":
            torch.testing.assert_close(outcome.per_query[name], values[order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("separate", [False, True])
def test_metrics_are_those_of_pytorch_metric_learning(separate: bool) -> None:
    rows, labels = sample(200)
    queries = dict(zip(("queries", "query_labels"), sample(50, seed=1), strict=True))
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, knn_func=CustomKNN(CosineSimilarity()))
    if separate:
        expected = calculator.get_accuracy(*queries.values(), rows, labels)
    else:
        queries = {}
        expected = calculator.get_accuracy(rows, labels)
    at_1 = expected["precision_at_1"]
    assert recall_at_k(rows, labels, **queries) == pytest.approx(at_1, abs=1e-9)
    assert precision_at_k(rows, labels, **queries) == pytest.approx(at_1, abs=1e-9)
    outcome = r_precision(rows, labels, **queries)
    assert outcome == pytest.approx(expected["r_precision"], abs=1e-9)
    outcome = map_at_r(rows, labels, **queries)
    assert outcome == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-9)


@pytest.mark.parametrize("k", [1, 5, 10, 500, 10**30])
def test_recall_and_precision_look_at_the_k_nearest(k: int) -> None:
    rows, labels = sample(classes=40)
    scores = cosines(rows, rows)
    np.fill_diagonal(scores, -np.inf)
    hits, precisions = [], []
    for i in range(len(rows)):
        relevant = (labels == labels[i]).numpy()
        if relevant.sum() > 1:
            nearest = np.argsort(-scores[i])[: min(k, len(rows) - 1)]
            hits.append(relevant[nearest].any())
            precisions.append(relevant[nearest].sum() / k)
    assert alone(labels)
    with pytest.warns(UserWarning, match="queries were left out"):
        assert recall_at_k(rows, labels, k=k) == pytest.approx(np.mean(hits))
    with pytest.warns(UserWarning, match="queries were left out"):
        assert precision_at_k(rows, labels, k=k) == pytest.approx(np.mean(precisions))


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
    outcome = mean_average_precision(items, labels, queries=queries, query_labels=query_labels)
    assert outcome == pytest.approx(np.mean(expected), abs=1e-9)
    hits = relevant[np.arange(30)[:, None], np.argsort(-scores)[:, :3]].any(1)
    outcome = recall_at_k(items, labels, k=3, queries=queries, query_labels=query_labels)
    assert outcome == pytest.approx(hits.mean())
    query_labels[7] = 99
    with pytest.warns(UserWarning, match="1 of 30 queries were left out"):
        outcome = every_metric(items, labels, queries=queries, query_labels=query_labels)
    assert 7 not in outcome.queries
    assert len(outcome.queries) == 29
    nearest = np.delete(np.argsort(-scores), 7, axis=0)[:, :10]
    np.testing.assert_array_equal(outcome.neighbors, nearest)


def test_votes_are_those_of_scikit_learn() -> None:
    rows, labels = sample(200, classes=2)
    test, test_labels = sample(50, classes=2, seed=1)
    oracle = KNeighborsClassifier(5, metric="cosine").fit(rows, labels)
    expected = oracle.score(test, test_labels)
    assert knn_accuracy(rows, labels, test, test_labels, k=5) == pytest.approx(expected)


def test_tied_classes_and_tied_voters_share_the_vote() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.0]])
    # Two classes have one vote each.
    assert knn_accuracy(train, [0, 1, 2, 2, 2], query, [1], k=2) == pytest.approx(1 / 2)
    # The third place is for one of three: class 0 has 1 + 1 / 3 votes, class 1 has 1 + 2 / 3.
    assert knn_accuracy(train, [0, 1, 0, 1, 1], query, [0], k=3) == 0
    assert knn_accuracy(train, [0, 1, 0, 1, 1], query, [1], k=3) == 1
    # Of a class that nobody has, and of one that no neighbour has.
    assert knn_accuracy(train, [0, 1, 2, 2, 2], query, [7], k=3) == 0
    assert knn_accuracy(train, [0, 0, 2, 2, 2], query, [2], k=2) == 0


# Exact cosines, so that the oracle has the same ties.
CORNERS = ((1.0, 0.0), (0.0, 2.0), (-1.0, 0.0), (0.0, 0.0))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(CORNERS), st.integers(0, 1)), min_size=3, max_size=6),
    st.integers(1, 7),
)
def test_ties_count_as_their_mean_over_all_orders(
    items: list[tuple[tuple[float, float], int]], k: int
) -> None:
    rows = torch.tensor([corner for corner, _ in items])
    labels = torch.tensor([label for _, label in items])
    labels[0] = labels[1]
    scores = cosines(rows, rows)
    expected = [
        np.mean([ordered(relevant, k) for relevant in orders_of(i, scores, labels)], axis=0)
        for i in range(len(rows))
        if (labels == labels[i]).sum() > 1
    ]
    left_out = pytest.warns(UserWarning, match="left out")
    with left_out if alone(labels) else contextlib.nullcontext():
        outcome = outcome_of(
            [
                recall(k),
                precision(k),
                METRICS["r_precision"],
                METRICS["map_at_r"],
                METRICS["mean_average_precision"],
            ],
            rows,
            labels,
            pairs=False,
        )
    values = torch.stack([*outcome.per_query.values()], dim=1)
    np.testing.assert_allclose(values, expected, atol=1e-12)


def orders_of(query: int, scores: np.ndarray, labels: torch.Tensor) -> list[np.ndarray]:
    """Which results are relevant, in every order that the scores of this query allow."""
    others = [i for i in range(len(labels)) if i != query]
    return [
        np.array([bool(labels[i] == labels[query]) for i in order])
        for order in itertools.permutations(others)
        if all(scores[query, a] >= scores[query, b] for a, b in itertools.pairwise(order))
    ]


def ordered(relevant: np.ndarray, k: int) -> list[float]:
    total = relevant.sum()
    precision = relevant.cumsum() / np.arange(1, len(relevant) + 1) * relevant
    return [
        relevant[:k].any(),
        relevant[:k].sum() / k,
        relevant[:total].sum() / total,
        precision[:total].sum() / total,
        precision.sum() / total,
    ]


@pytest.mark.parametrize("width", [17, 512])
def test_a_collapsed_tower_gets_chance_whatever_the_order_of_the_rows(width: int) -> None:
    row = torch.randn(width, generator=torch.Generator().manual_seed(width))
    rows, labels = row.repeat(1003, 1), torch.arange(1003) % 17
    outcome = every_metric(rows, labels)
    chance = (labels.bincount()[labels] - 1) / 1002
    per_query = outcome.per_query
    torch.testing.assert_close(per_query["recall_at_1"], chance.double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        per_query["r_precision"], per_query["precision_at_10"], atol=1e-12, rtol=0
    )
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    other = every_metric(rows, labels[order])
    assert_queries_equal(other, outcome, order)
    assert outcome.separation is not None
    assert outcome.separation.roc_auc == 0.5
    assert outcome.separation.roc_auc_error == 0
    torch.testing.assert_close(outcome.neighbors[500], torch.arange(10))
    rows, labels = rows[:1000], torch.arange(1000) % 4
    assert knn_accuracy(rows, labels, rows, labels, k=1) == pytest.approx(1 / 4)


@pytest.mark.parametrize("width", [17, 512])
@pytest.mark.parametrize("count", [5, 67, 1003])
def test_equal_rows_have_equal_similarities_wherever_they_stand(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(count)
    kinds = torch.randint(max(2, count // 9), (count,), generator=generator)
    rows = torch.randn(count, width, generator=generator)[kinds]
    search = blocks.prepare(rows, kinds, rows, kinds)
    scores = torch.cat(
        [*blocks.over_blocks(search, torch.arange(count), lambda block: block.scores.clone())]
    )
    first = torch.stack([(kinds == kind).nonzero()[0, 0] for kind in kinds])
    assert torch.equal(scores[:, :count], scores[:, first])
    assert torch.equal(scores, scores[first])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40), st.integers(0, 3))
def test_block_size_and_row_order_do_not_matter(
    seed: int, classes: int, block_rows: int, duplicates: int
) -> None:
    rows, labels = sample(90, classes, seed)
    rows = rows.double()
    rows[:duplicates] = rows[50]
    labels = labels.clamp_max(labels[labels.bincount(minlength=classes)[labels] > 1].max())
    rows, labels = rows[keep := labels.bincount()[labels] > 1], labels[keep]
    whole = every_metric(rows, labels, pairs=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK_ROWS", block_rows)
        outcome = every_metric(rows, labels, pairs=False)
    assert_outcomes_equal(outcome, whole, atol=1e-12, rtol=0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    outcome = every_metric(rows[order], labels[order], pairs=False)
    assert_queries_equal(outcome, whole, order)
    torch.testing.assert_close(outcome.neighbor_scores, whole.neighbor_scores[order])


def test_one_pass_gives_what_each_function_gives() -> None:
    rows, labels = sample()
    metrics = [recall(7), precision(7), *QUERY_METRICS.values()]
    outcome = outcome_of(metrics, rows, labels, neighbors=4)
    assert list(outcome.per_query) == [metric.name for metric in metrics]
    assert outcome.queries.tolist() == list(range(120))
    expected = {
        "recall_at_7": recall_at_k(rows, labels, k=7),
        "precision_at_7": precision_at_k(rows, labels, k=7),
        "r_precision": r_precision(rows, labels),
        "map_at_r": map_at_r(rows, labels),
        "mean_average_precision": mean_average_precision(rows, labels),
    }
    means = {name: float(outcome.per_query[name].mean()) for name in expected}
    assert means == pytest.approx(expected, abs=1e-12)
    votes = [
        knn_accuracy(
            rows[keep := torch.arange(120) != i], labels[keep], rows[i : i + 1], labels[i : i + 1]
        )
        for i in range(10)
    ]
    assert outcome.per_query["knn_accuracy"][:10].tolist() == pytest.approx(votes)
    assert outcome.neighbors.shape == outcome.neighbor_scores.shape == (120, 4)
    assert outcome.neighbor_scores.dtype == torch.float32
    assert every_metric(rows, labels, pairs=False).separation is None
    small = every_metric(rows[:3], [0, 0, 0])
    assert small.neighbors.shape == (3, 2)


def test_classes_of_every_size_are_ranked_alike() -> None:
    """A query is ranked as it would be among queries of classes as large as its own."""
    rows, _ = sample(100)
    labels = torch.tensor([0] * 60 + [1] * 25 + [2] * 13 + [3] * 2)
    outcome = every_metric(rows, labels)
    for i in (0, 59, 60, 90, 97, 98, 99):
        others = torch.arange(100) != i
        alone = {"queries": rows[i : i + 1], "query_labels": labels[i : i + 1]}
        one = mean_average_precision(rows[others], labels[others], **alone)
        assert float(outcome.per_query["mean_average_precision"][i]) == pytest.approx(one, abs=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_and_zero_rows_are_taken(function: Callable[..., float]) -> None:
    rows, labels = sample()
    rows[3:6] = 0
    rows, order = rows.half(), torch.arange(120).flip(0)
    expected = function(rows.float(), labels)
    assert function(rows, labels) == expected
    assert function(rows[order].numpy(), labels[order].numpy()) == pytest.approx(expected, abs=1e-9)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(rows, labels) == expected


def test_queries_without_another_of_their_class_are_left_out_and_counted() -> None:
    rows, _ = sample(5)
    for function in FUNCTIONS:
        with pytest.warns(UserWarning, match="1 of 5 queries were left out") as caught:
            function(rows, [0, 0, 1, 1, 2])
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with pytest.raises(ValueError, match="None of the 5 queries has another item of its class"):
            function(rows, torch.arange(5))
    with pytest.raises(ValueError, match="None of the 1 queries"):
        mean_average_precision(rows[:1], [0])
    with pytest.warns(UserWarning, match="1 of 5 queries were left out"):
        outcome = every_metric(rows, [0, 0, 1, 1, 2])
    assert outcome.queries.tolist() == [0, 1, 2, 3]
    assert outcome.separation is not None
    assert (outcome.separation.num_same, outcome.separation.num_different) == (2, 8)


def test_wrong_arguments_are_named() -> None:
    rows, labels = sample(10)
    for function in (recall_at_k, precision_at_k):
        with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
            function(rows, labels, k=0)
        with pytest.raises(TypeError, match=r"`k` must be an integer, got 1\.5"):
            function(rows, labels, k=1.5)
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="`queries` and `query_labels` go together"):
            function(rows, labels, queries=rows)
        with pytest.raises(ValueError, match="`queries` must have embedding size 6, got 3"):
            function(rows, labels, queries=rows[:, :3], query_labels=labels)
        with pytest.raises(ValueError, match="`query_labels` must have one label per row"):
            function(rows, labels, queries=rows, query_labels=labels[:3])
    with pytest.raises(ValueError, match="`k` must be at most the number of items, got 11 for 10"):
        knn_accuracy(rows, labels, rows, labels, k=11)
    with pytest.raises(TypeError, match=r"`labels` must be a list, .* got NoneType"):
        recall_at_k(torch.eye(2), None)
    with pytest.raises(TypeError, match=r"got object.*unique\(list\(map\(str, labels\)\)"):
        recall_at_k(torch.eye(2), [object(), object()])
    with pytest.raises(ValueError, match="Turn one-hot rows into class ids"):
        mean_average_precision(rows, torch.eye(10))
    with pytest.raises(ValueError, match="`test` must have at least one row, got none"):
        knn_accuracy(rows, labels, rows[:0], [], k=1)
    with pytest.raises(ValueError, match="`train_labels` must have one label per row"):
        knn_accuracy(rows, labels[1:], rows, labels, k=1)
    rows[3] = float("inf")
    with pytest.raises(ValueError, match="`embeddings` has NaN or infinite values in 1 of 10"):
        recall_at_k(rows, labels)


def test_the_example_of_four_items_is_right() -> None:
    members = torch.tensor([[0, 2, 3, 4]])  # the last is the filling
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.1, blocks.NO_ITEM]])
    block = blocks.Block(torch.zeros(1, dtype=torch.int64), scores, members)
    ranks = ranking.rank_in_place(block, torch.tensor([3]))
    assert ranks.above.tolist() == [[3, 1, 0]]
    assert ranks.tied.tolist() == [[1, 2, 1]]
    assert ranks.relevant_above.tolist() == [[2, 1, 0]]
    assert ranks.relevant_tied.tolist() == [[1, 1, 1]]
    assert precision(2).function(ranks).tolist() == [0.75]


def test_ranks_off_the_cpu_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = sample(300)
    rows[40:60] = rows[80:100]
    expected = every_metric(rows, labels)
    monkeypatch.setattr(ranking, "_on_cpu", lambda tensor: False)
    assert_outcomes_equal(every_metric(rows, labels), expected, atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore:.* left out")
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", ["recall_at_1", "recall_at_4", "precision_at_1", "r_precision"])
def test_a_metric_alone_is_that_of_its_ranks(
    name: str, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_on_cpu", lambda tensor: on_cpu)
    rows, labels = sample(400, classes=30)
    labels[200:] = 3  # classes of many sizes in a block
    for tied in (0, 30, 250, 400):
        # Coarse, so that many scores at the last place are equal.
        coarse = rows.mul(1.5).round() if tied else rows
        coarse[:tied] = coarse[0]
        together = retrieval_figures(coarse, labels, [name, "mean_average_precision"])
        assert retrieval_figures(coarse, labels, [name])[name] == pytest.approx(
            together[name], abs=1e-12
        )


@pytest.mark.parametrize("first", [None, 1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_counted_whatever_the_scores(dtype: torch.dtype, first: int | None) -> None:
    values = [-1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, 1.0000001, torch.finfo(dtype).tiny]
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor(values, dtype=dtype)[torch.randint(10, (70, 50), generator=generator)]
    # Some rows are without ties, so that a cut is outcome.
    scores[:64] += 1e-3 * torch.rand(64, 50, dtype=dtype, generator=generator)
    scores[:, 49] = blocks.NO_ITEM
    members = torch.full((70, 7), 49)
    for row, count in enumerate(torch.randint(8, (70,), generator=generator)):
        members[row, :count] = torch.randperm(49, generator=generator)[:count]
    relevant = torch.zeros(70, 50, dtype=torch.bool).scatter_(1, members, True)
    relevant[:, 49] = False
    total = relevant.sum(dim=1)
    block = blocks.Block(torch.arange(70), scores.clone(), members)
    ranks = ranking.rank_in_place(block, total, first)
    assert torch.equal(ranks.total, total.double())
    width = ranks.above.shape[1]
    for row in range(70):
        own = scores[row, relevant[row]].sort().values
        expected = torch.stack(
            [
                (scores[row] > own[:, None]).sum(dim=1),
                (scores[row] == own[:, None]).sum(dim=1),
                (own > own[:, None]).sum(dim=1),
                (own == own[:, None]).sum(dim=1),
            ]
        )
        given = torch.stack(ranks[:4])[:, row, max(0, width - len(own)) :]
        within = given.shape[1] - int(given[0].isinf().sum())
        assert torch.equal(
            given[:, given.shape[1] - within :], expected[:, len(own) - within :].double()
        )
        assert ranks.above[row, : width - within].isinf().all()
        assert (expected[0, : len(own) - within] >= (first or 50)).all()


@pytest.mark.parametrize("collapsed", [0, 30, 120])
def test_metrics_together_are_those_of_each_function(collapsed: int) -> None:
    rows, labels = sample()
    rows[:collapsed] = rows[0]
    queries, query_labels = sample(40, seed=1)
    gallery = {"queries": queries, "query_labels": query_labels}
    for options in ({}, gallery):
        expected = {
            "recall_at_3": recall_at_k(rows, labels, k=3, **options),
            "precision_at_200": precision_at_k(rows, labels, k=200, **options),
            "r_precision": r_precision(rows, labels, **options),
            "map_at_r": map_at_r(rows, labels, **options),
            "mean_average_precision": mean_average_precision(rows, labels, **options),
        }
        outcome = retrieval_figures(rows, labels, list(expected), **options)
        assert list(outcome) == list(expected)
        assert outcome == pytest.approx(expected, abs=1e-12)
        ones = {name: retrieval_figures(rows, labels, [name], **options)[name] for name in expected}
        assert ones == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_rows_are_an_error_that_names_them(function: Any) -> None:
    none, of_none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    rows, labels = sample(10)
    with pytest.raises(ValueError, match="`embeddings` must have at least one row"):
        function(none, of_none)
    with pytest.raises(ValueError, match="`queries` must have at least one row"):
        function(rows, labels, queries=rows[:0], query_labels=of_none)


@pytest.mark.parametrize("include", ["map_at_r", (), ["recall_at_0"], ["recall"], ["knn"], [5]])
def test_unknown_metrics_are_refused(include: Any) -> None:
    with pytest.raises(ValueError, match=r"^`include` "):
        retrieval_figures(*sample(), include)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing_and_are_given_back(two_threads: None) -> None:
    rows, labels = sample(700)
    outcome = every_metric(rows, labels)
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    torch.set_num_threads(1)
    expected = every_metric(rows, labels)
    assert_outcomes_equal(outcome, expected, atol=0, rtol=0)
    assert asdict(outcome.separation) == pytest.approx(asdict(expected.separation), rel=1e-12)


def test_an_error_in_a_block_comes_through_and_threads_are_given_back(two_threads: None) -> None:
    search = blocks.prepare(*sample(2000))

    def fail(block: blocks.Block) -> None:
        raise MemoryError(f"at {block.rows[0]}")

    with pytest.raises(MemoryError, match="at 0"):
        list(blocks.over_blocks(search, search.rows(), fail))
    assert torch.get_num_threads() == 2


def test_labels_that_are_every_second_of_others_are_laid_out_anew() -> None:
    # torch warns, once in a process, where it searches in a tensor that is not contiguous.
    assert _checks.as_labels("labels", torch.arange(6)[::2]).is_contiguous()
