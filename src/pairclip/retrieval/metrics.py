"""Metrics of embeddings and labels, in blocks of queries.

Every item is ranked for every query by cosine similarity. Items of equal similarity count as the
expectation over their random order (McSherry and Najork 2008, "Computing information retrieval
performance measures efficiently in the presence of tied scores"), so that a collapsed tower gets
what chance gives it, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pairclip import _checks
from pairclip._vectors import highest
from pairclip.retrieval import query_metrics
from pairclip.retrieval.blocks import over_blocks, prepare
from pairclip.retrieval.one_pass import means
from pairclip.retrieval.table import METRICS, precision, ranking_metric, recall


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
    k = _checks.check_positive_int("k", k)
    return means([recall(k)], embeddings, labels, queries, query_labels)[0]


def precision_at_k(
    embeddings: Any, labels: Any, *, k: int = 1, queries: Any = None, query_labels: Any = None
) -> float:
    """Mean share of a query's own class among the k nearest.

    Places beyond the last item count as misses.

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
        >>> from pairclip.retrieval import precision_at_k
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> precision_at_k(embeddings, torch.tensor([0, 0, 1, 1]), k=2)
        0.5
    """
    k = _checks.check_positive_int("k", k)
    return means([precision(k)], embeddings, labels, queries, query_labels)[0]


def r_precision(
    embeddings: Any, labels: Any, *, queries: Any = None, query_labels: Any = None
) -> float:
    """Mean share of a query's own class among the R nearest, R being the size of that class.

    The query itself counts neither among the nearest nor in R.

    Args:
        embeddings: The items to search, shape ``[N, D]``, floating point, any length.
        labels: Class of each item, shape ``[N]``, integer.
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
        >>> from pairclip.retrieval import r_precision
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> r_precision(embeddings, torch.tensor([0, 0, 1, 1]))
        1.0

    References:
        Musgrave, Belongie and Lim 2020, "A Metric Learning Reality Check".
    """
    return means([METRICS["r_precision"]], embeddings, labels, queries, query_labels)[0]


def map_at_r(
    embeddings: Any, labels: Any, *, queries: Any = None, query_labels: Any = None
) -> float:
    """Mean average precision at R: only the R nearest count, R being the size of the class.

    The precisions at the places of relevant items are summed over the first R places, and divided
    by R. Unlike the R-precision it rewards a good order within these places.

    Args:
        embeddings: The items to search, shape ``[N, D]``, floating point, any length.
        labels: Class of each item, shape ``[N]``, integer.
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
        >>> from pairclip.retrieval import map_at_r
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> map_at_r(embeddings, torch.tensor([0, 0, 1, 1]))
        1.0

    References:
        Musgrave, Belongie and Lim 2020, "A Metric Learning Reality Check".
    """
    return means([METRICS["map_at_r"]], embeddings, labels, queries, query_labels)[0]


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
    metric = METRICS["mean_average_precision"]
    return means([metric], embeddings, labels, queries, query_labels)[0]


def retrieval_figures(
    embeddings: Any,
    labels: Any,
    include: Sequence[str] = ("precision_at_1", "r_precision", "map_at_r"),
    *,
    queries: Any = None,
    query_labels: Any = None,
) -> dict[str, float]:
    """Several of these metrics, in one pass over the similarities.

    Args:
        embeddings: The items to search, shape ``[N, D]``, floating point, any length.
        labels: Class of each item, shape ``[N]``, integer.
        include: Any of ``"recall_at_K"`` and ``"precision_at_K"`` for a number K,
            ``"r_precision"``, ``"map_at_r"`` and ``"mean_average_precision"``.
        queries: Shape ``[M, D]``; None takes each item as a query among the others.
        query_labels: Class of each query, shape ``[M]``.

    Returns:
        Each metric by its name, as the function of that name gives it.

    Raises:
        ValueError: If there is no such metric, shapes don't fit, an embedding is not finite, or
            no query has an item of its own class to find.

    Warns:
        UserWarning: If queries were left out because no other item is of their class.

    Example:
        >>> import torch
        >>> from pairclip import retrieval_figures
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> retrieval_figures(embeddings, torch.tensor([0, 0, 1, 1]), ["recall_at_1", "map_at_r"])
        {'recall_at_1': 1.0, 'map_at_r': 1.0}
    """
    if isinstance(include, str) or not include:
        raise ValueError(f"`include` must be a list of metrics, got {include!r}.")
    metrics = [ranking_metric(name) for name in include]
    values = means(metrics, embeddings, labels, queries, query_labels)
    return dict(zip(include, values, strict=True))


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
    k = _checks.check_positive_int("k", k)
    names = ("train", "train_labels", "test", "test_labels")
    search = prepare(train, train_labels, test, test_labels, names=names)
    if k > len(search.items):
        raise ValueError(f"`k` must be at most the number of items, got {k} for {len(train)}.")
    if not len(search.queries):
        raise ValueError("`test` must have at least one row, got none.")
    correct = over_blocks(
        search,
        search.rows(),
        lambda block: query_metrics.vote(search, block, highest(block.scores, k + 1), k),
    )
    return float(torch.cat([*correct]).mean())
