"""Retrieval figures of embeddings and labels, in blocks of queries.

Every item is ranked for every query by cosine similarity. Items of equal similarity count as the
expectation over their random order (McSherry and Najork 2008, "Computing information retrieval
performance measures efficiently in the presence of tied scores"), so that a collapsed tower gets
what chance gives it, whatever the order of the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip import _checks

# Similarities that are looked at in one block.
_BLOCK_CELLS = 1 << 22


def recall_at_k(
    embeddings: Any, labels: Any, *, k: int = 1, queries: Any = None, query_labels: Any = None
) -> float:
    """Share of queries with an item of their own class among the k nearest (hit rate).

    Args:
        embeddings: The items to search, shape ``[N, D]``, floating point, any length.
        labels: Class of each item, shape ``[N]``, integer.
        k: Items looked at, at least 1.
        queries: Shape ``[M, D]``; None takes each item as a query among the others.
        query_labels: Class of each query, shape ``[M]``.

    Returns:
        In ``[0, 1]``.

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite, or no query has an item of
            its own class to find.

    Warns:
        UserWarning: If queries were left out because no other item is of their class.

    Example:
        >>> import torch
        >>> from pairclip import recall_at_k
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> recall_at_k(embeddings, torch.tensor([0, 0, 1, 1]))
        1.0
    """
    _checks.check_positive_int("k", k)
    found = per_query(embeddings, labels, queries, query_labels, ks=(k,))
    return float(found.hits[:, 0].mean())


def mean_average_precision(
    embeddings: Any, labels: Any, *, queries: Any = None, query_labels: Any = None
) -> float:
    """Mean over queries of the average precision of all items, ranked by similarity.

    Args:
        embeddings: The items to search, shape ``[N, D]``, floating point, any length.
        labels: Class of each item, shape ``[N]``, integer.
        queries: Shape ``[M, D]``; None takes each item as a query among the others.
        query_labels: Class of each query, shape ``[M]``.

    Returns:
        In ``(0, 1]``.

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite, or no query has an item of
            its own class to find.

    Warns:
        UserWarning: If queries were left out because no other item is of their class.

    Example:
        >>> import torch
        >>> from pairclip import mean_average_precision
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> mean_average_precision(embeddings, torch.tensor([0, 0, 1, 1]))
        1.0
    """
    found = per_query(embeddings, labels, queries, query_labels)
    return float(found.average_precision.mean())


def knn_accuracy(
    train: Any, train_labels: Any, test: Any, test_labels: Any, *, k: int = 5
) -> float:
    """Share of test items whose class gets the most votes of their k nearest training items.

    Where training items of equal similarity compete for the last places, each votes with its
    chance of a place; where classes tie, each counts with its chance of being drawn.

    Args:
        train: Shape ``[N, D]``, floating point, any length.
        train_labels: Class of each, shape ``[N]``, integer.
        test: Shape ``[M, D]``.
        test_labels: Class of each, shape ``[M]``, integer.
        k: Voters, at most N.

    Returns:
        In ``[0, 1]``.

    Raises:
        ValueError: If shapes don't fit, `k` is out of range, or an embedding is not finite.

    Example:
        >>> import torch
        >>> from pairclip import knn_accuracy
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> test = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> knn_accuracy(train, torch.tensor([0, 1]), test, torch.tensor([0, 1]), k=1)
        1.0
    """
    _checks.check_positive_int("k", k)
    names = ("train", "train_labels", "test", "test_labels")
    search = _search(train, train_labels, test, test_labels, names)
    if k > len(search.items):
        raise ValueError(f"`k` must be at most the number of items, got {k} for {len(train)}.")
    if not len(search.queries):
        raise ValueError("`test` must have at least one row, got none.")
    return float(torch.cat([_vote(block, k) for block in _blocks(search)]).mean())


class PerQuery(NamedTuple):
    """Figures of the queries that have an item of their own class to find."""

    queries: Tensor  # [Q] row of each query
    hits: Tensor  # [Q, len(ks)] float64: chance of one of its class among the k nearest
    average_precision: Tensor  # [Q] float64
    knn_correct: Tensor | None  # [Q] float64: chance that its k neighbours vote for its class


class _Search(NamedTuple):
    items: Tensor  # [N, D] unit rows
    labels: Tensor  # [N]
    queries: Tensor  # [M, D] unit rows
    query_labels: Tensor  # [M]
    own: bool  # whether query i is item i, which is then not among its results


class _Block(NamedTuple):
    queries: Tensor  # [b] row of each query
    scores: Tensor  # [b, n] similarities, descending
    relevant: Tensor  # [b, n] whether the item at this rank is of the query's class
    ranked_labels: Tensor  # [b, n]
    labels: Tensor  # [b]


def _search(
    embeddings: Any,
    labels: Any,
    queries: Any,
    query_labels: Any,
    names: tuple[str, str, str, str] = ("embeddings", "labels", "queries", "query_labels"),
) -> _Search:
    items = _checks.unit_rows(_checks.as_embeddings(names[0], embeddings, finite=True))
    labels = _checks.as_labels(names[1], labels, length=len(items)).to(items.device)
    if (queries is None) != (query_labels is None):
        raise ValueError(f"`{names[2]}` and `{names[3]}` go together; only one was given.")
    if queries is None:
        return _Search(items, labels, items, labels, own=True)
    rows = _checks.unit_rows(_checks.as_embeddings(names[2], queries, finite=True)).to(items)
    if rows.shape[1] != items.shape[1]:
        raise ValueError(
            f"`{names[2]}` must have embedding size {items.shape[1]}, got {rows.shape[1]}."
        )
    query_labels = _checks.as_labels(names[3], query_labels, length=len(rows))
    return _Search(items, labels, rows, query_labels.to(items.device), own=False)


def _blocks(search: _Search) -> Iterator[_Block]:
    size = max(1, _BLOCK_CELLS // max(1, len(search.items)))
    for start in range(0, len(search.queries), size):
        queries = torch.arange(
            start, min(start + size, len(search.queries)), device=search.items.device
        )
        scores, ranking = (search.queries[queries] @ search.items.T).sort(dim=1, descending=True)
        if search.own:
            others = ranking != queries[:, None]
            scores = scores[others].view(len(queries), -1)
            ranking = ranking[others].view(len(queries), -1)
        ranked_labels = search.labels[ranking]
        labels = search.query_labels[queries]
        yield _Block(queries, scores, ranked_labels == labels[:, None], ranked_labels, labels)


def per_query(
    embeddings: Any,
    labels: Any,
    queries: Any = None,
    query_labels: Any = None,
    *,
    ks: tuple[int, ...] = (1,),
    neighbors: int | None = None,
) -> PerQuery:
    """All figures from one ranking of each query; `neighbors` vote for its class, if given."""
    search = _search(embeddings, labels, queries, query_labels)
    rows, hits, precision, correct = [], [], [], []
    for whole_block in _blocks(search):
        findable = whole_block.relevant.any(dim=1)
        block = _Block(*(part[findable] for part in whole_block))
        if not len(block.queries):
            continue
        ties = _ties(block.scores)
        rows.append(block.queries)
        hits.append(torch.stack([_hit(block.relevant, ties, k) for k in ks], dim=1))
        precision.append(_average_precision(block.relevant, ties))
        if neighbors is not None:
            correct.append(_vote(block, neighbors))
    left_out = len(search.queries) - sum(map(len, rows))
    if left_out == len(search.queries):
        raise ValueError(
            f"None of the {left_out} queries has another item of its class to find. Check that "
            "the labels are class ids, and give each class at least two items."
        )
    if left_out:
        warnings.warn(
            f"{left_out} of {len(search.queries)} queries were left out: no other item is of "
            "their class.",
            stacklevel=3,
        )
    return PerQuery(
        torch.cat(rows),
        torch.cat(hits),
        torch.cat(precision),
        torch.cat(correct) if neighbors is not None else None,
    )


class _Ties(NamedTuple):
    """For each rank (from 0), the group of equal scores that it belongs to."""

    start: Tensor  # [b, n] first rank of the group
    stop: Tensor  # [b, n] rank behind the group


def _ties(scores: Tensor) -> _Ties:
    count = scores.shape[1]
    ranks = torch.arange(count, device=scores.device).expand_as(scores)
    first = torch.ones_like(scores, dtype=torch.bool)
    first[:, 1:] = scores[:, 1:] != scores[:, :-1]
    start = ranks.where(first, 0).cummax(dim=1).values
    last = first.roll(-1, dims=1)
    last[:, -1] = True
    stop = (ranks + 1).where(last, count).flip(1).cummin(dim=1).values.flip(1)
    return _Ties(start, stop)


def _before(relevant: Tensor) -> Tensor:
    """Relevant items before each rank and behind the last, float64 ``[b, n + 1]``."""
    counts = torch.zeros(len(relevant), relevant.shape[1] + 1, dtype=torch.float64)
    counts = counts.to(relevant.device)
    torch.cumsum(relevant, dim=1, dtype=torch.float64, out=counts[:, 1:])
    return counts


def _average_precision(relevant: Tensor, ties: _Ties) -> Tensor:
    """Expected average precision of each query, float64 ``[b]``.

    At place j of t tied items, r of them relevant, behind n others with m relevant ones, the
    expectation of "relevant here, times the precision here" is
    ``(r / t) * (m + 1 + (j - 1) * (r - 1) / (t - 1)) / (n + j)``.
    """
    before = _before(relevant)
    found = before.gather(1, ties.start)
    tied_relevant = before.gather(1, ties.stop) - found
    tied = ties.stop - ties.start
    rank = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    place = rank - ties.start
    more = (place - 1) * (tied_relevant - 1) / (tied - 1).clamp_min(1)
    precision = (tied_relevant / tied) * (found + 1 + more) / rank
    return precision.sum(dim=1) / before[:, -1]


def _hit(relevant: Tensor, ties: _Ties, k: int) -> Tensor:
    """Chance that one of the k nearest is relevant, float64 ``[b]``: 1 - C(t-r, s) / C(t, s)."""
    count = relevant.shape[1]
    last = min(k, count) - 1
    before = _before(relevant)
    start, stop = ties.start[:, last : last + 1], ties.stop[:, last : last + 1]
    found = before.gather(1, start)[:, 0]
    tied_relevant = before.gather(1, stop)[:, 0] - found
    tied = (stop - start)[:, 0].double()
    places = (last + 1 - start)[:, 0].double()
    none_of_them = (tied - tied_relevant >= places).double() * (
        _log_choose(tied - tied_relevant, places) - _log_choose(tied, places)
    ).exp()
    return torch.where(found > 0, 1.0, 1 - none_of_them)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    k = torch.minimum(n, k)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _vote(block: _Block, k: int) -> Tensor:
    """Chance that each query's class wins the vote of its k nearest, float64 ``[b]``."""
    count = block.scores.shape[1]
    last = min(k, count) - 1
    # Scores descend, so all that compete for the last places are in front of the first below.
    threshold = block.scores[:, last : last + 1]
    width = int((block.scores >= threshold).sum(dim=1).max()) if len(threshold) else 0
    scores, voters = block.scores[:, :width], block.ranked_labels[:, :width]
    sure = scores > threshold
    tied = scores == threshold
    places = last + 1 - sure.sum(dim=1, keepdim=True)
    weight = sure.double() + tied * (places / tied.sum(dim=1, keepdim=True).clamp_min(1))
    classes, voters = voters.unique(return_inverse=True)
    votes = torch.zeros(len(scores), len(classes) + 1, dtype=torch.float64, device=scores.device)
    votes.scatter_add_(1, voters, weight)
    if not len(classes):
        return votes[:, 0]
    own = torch.searchsorted(classes, block.labels).clamp_max(len(classes) - 1)
    mine = votes.gather(1, own[:, None])[:, 0] * (classes[own] == block.labels)
    best = votes.max(dim=1).values
    # Weights are sums of fractions: equal votes may differ in their last bits.
    winners = (votes[:, :-1] >= best[:, None] - 1e-9).sum(dim=1)
    return torch.where(mine >= best - 1e-9, 1 / winners.double(), 0.0)
