"""The metrics that there are. What computes, tabulates or explains them reads it here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor

from pairclip.retrieval import one_metric, query_metrics
from pairclip.retrieval.blocks import Block


@dataclass(frozen=True)
class Metric:
    """A number about retrieval, and how it is called and computed.

    Attributes:
        name: Its key in a dict, a file and an `Evaluation`.
        title: Its name in a table.
        meaning: What it says, to go on after the title and a colon.
        of: What `function` takes. ``"ranks"``: `Ranks`, and it returns a value for each query,
            float64 ``[b]``. ``"nearest"``: the search, a block of it, and scores and columns of
            the nearest items, with the same result. ``"pairs"``: a `PairSeparation`, and it
            returns a number.
        function: Computes it.
        places: How many of the nearest items it looks at: 0 for as many as the query has to find,
            None for all.
        alone: Computes the same at less cost where no other metric is asked for, from a block,
            which it overwrites, and the relevant items of each query. None where nothing is saved.
    """

    name: str
    title: str
    meaning: str
    of: Literal["ranks", "nearest", "pairs"]
    function: Callable[..., Any]
    places: int | None = 0
    alone: Callable[[Block, Tensor], Tensor] | None = None


def recall(k: int) -> Metric:
    """The row of ``recall_at_k``."""
    return Metric(
        f"recall_at_{k}",
        f"Recall at {k}",
        "share of queries with an image of their class among the k nearest",
        of="ranks",
        function=partial(query_metrics.hit, k=float(k)),
        places=k,
        alone=partial(one_metric.hit, k=k),
    )


def precision(k: int) -> Metric:
    """The row of ``precision_at_k``."""
    return Metric(
        f"precision_at_{k}",
        f"Precision at {k}",
        "share of the k nearest images that are of the query's class",
        of="ranks",
        function=partial(query_metrics.precision, k=float(k)),
        places=k,
        # Of one place, the expected share is the chance of a hit.
        alone=partial(one_metric.hit if k == 1 else one_metric.precision, k=k),
    )


def _of_pairs(name: str, title: str, meaning: str, attribute: str | None = None) -> Metric:
    return Metric(name, title, meaning, of="pairs", function=attrgetter(attribute or name))


_MEAN = "mean cosine of the embeddings of two images, over all pairs of that kind"
_SPREAD = "how far these cosines are spread around their mean"
_AT_ANY_K = {"recall": recall, "precision": precision}

# Of all that are about queries, more is better.
METRICS = {
    metric.name: metric
    for metric in (
        *map(recall, (1, 5, 10)),
        precision(10),
        Metric(
            "r_precision",
            "R-precision",
            "share of the R nearest images that are of the query's class, R being all that the "
            "class has to find",
            of="ranks",
            function=query_metrics.r_precision,
            alone=one_metric.r_precision,
        ),
        Metric(
            "map_at_r",
            "MAP@R",
            "mean average precision of the R nearest: it rewards right images that come first",
            of="ranks",
            function=query_metrics.map_at_r,
        ),
        Metric(
            "mean_average_precision",
            "Mean average precision",
            "mean over queries of the average precision of all images",
            of="ranks",
            function=query_metrics.average_precision,
            places=None,
        ),
        Metric(
            "knn_accuracy",
            "k-nearest-neighbour accuracy",
            "share of queries whose class wins the vote of the 5 nearest",
            of="nearest",
            function=partial(query_metrics.vote, k=5),
            places=5,
        ),
        _of_pairs("same_mean", "Mean similarity, same class", _MEAN),
        _of_pairs("same_std", "Standard deviation, same class", _SPREAD),
        _of_pairs("different_mean", "Mean similarity, different classes", _MEAN),
        _of_pairs("different_std", "Standard deviation, different classes", _SPREAD),
        _of_pairs(
            "gap",
            "Gap between the two means",
            "how much more alike two images of one class are than two of different classes",
        ),
        _of_pairs(
            "roc_auc",
            "ROC AUC of pairs",
            "chance that a pair of one class is more alike than one of two classes",
        ),
        _of_pairs(
            "pair_average_precision",
            "Average precision of pairs",
            "average precision of all pairs ranked by similarity, those of one class being right",
            attribute="average_precision",
        ),
        _of_pairs(
            "best_threshold",
            "Best threshold for pairs",
            "cosine above which two images are best called of one class",
        ),
        _of_pairs(
            "balanced_accuracy",
            "Balanced accuracy at that threshold",
            "mean share of pairs of either kind that it calls right, on these same pairs",
        ),
    )
}
QUERY_METRICS = {name: metric for name, metric in METRICS.items() if metric.of != "pairs"}
PAIR_METRICS = {name: metric for name, metric in METRICS.items() if metric.of == "pairs"}


def ranking_metric(name: str) -> Metric:
    """The metric of ranks that `retrieval_figures` calls so, with any number for K."""
    if name in METRICS and METRICS[name].of == "ranks":
        return METRICS[name]
    at_k = re.fullmatch(r"([a-z]+)_at_([1-9][0-9]*)", str(name))
    if at_k is not None and at_k[1] in _AT_ANY_K:
        return _AT_ANY_K[at_k[1]](int(at_k[2]))
    ranked = [key for key, metric in METRICS.items() if metric.of == "ranks"]
    names = [
        *(f"{family}_at_K" for family in _AT_ANY_K),
        *(key for key in ranked if not re.search(r"_at_[0-9]+$", key)),
    ]
    raise ValueError(
        f"`include` has {name!r}, but metrics are {', '.join(map(repr, names))}, with a number for "
        "K."
    )
