"""How far pairs of one class and pairs of different classes are apart, from histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip._vectors import class_squares, class_sums, group_by_slot
from pairclip.retrieval.blocks import Search, prepare
from pairclip.retrieval.pair_counts import BINS, PairCounts
from pairclip.retrieval.query_metrics import expected_precision, harmonic

# A larger bound has the pairs counted again, in bins over the range that they have.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class PairSeparation:
    """How well the similarity of two items tells whether they are of one class, over all pairs.

    A metric that needs a kind of pair that isn't there is NaN.

    Attributes:
        same_mean: Mean cosine of the pairs of one class; in ``[-1, 1]``.
        same_std: Its standard deviation over these pairs, to 1e-6.
        different_mean: Mean cosine of the pairs of different classes.
        different_std: Its standard deviation over these pairs, to 1e-6.
        gap: ``same_mean - different_mean``.
        roc_auc: Chance that a pair of one class is more similar than one of different classes,
            a tie counting half; in ``[0, 1]``.
        roc_auc_error: How far that may be off, because pairs are counted in bins.
        average_precision: Of all pairs, ranked by similarity, those of one class being relevant;
            tied pairs count as the expectation over their random order.
        average_precision_error: How far that may be off.
        best_threshold: The similarity from which to call two items the same class.
        balanced_accuracy: Mean of the shares of either kind of pair that it gets right.
        balanced_accuracy_error: How much better another threshold may be.
        num_same: Pairs of one class.
        num_different: Pairs of different classes.
    """

    same_mean: float
    same_std: float
    different_mean: float
    different_std: float
    gap: float
    roc_auc: float
    roc_auc_error: float
    average_precision: float
    average_precision_error: float
    best_threshold: float
    balanced_accuracy: float
    balanced_accuracy_error: float
    num_same: int
    num_different: int


def separate(search: Search, counts: PairCounts) -> PairSeparation:
    """Metrics of these counts; the pairs are counted again if the bins are too coarse."""
    separation = _separation(search, counts)
    while max(separation.roc_auc_error, separation.average_precision_error) > _TOLERANCE:
        low, high = counts.range()
        if low == high:
            # All pairs are tied, wherever in their bin they are.
            return replace(
                separation,
                roc_auc_error=0.0,
                average_precision_error=0.0,
                balanced_accuracy_error=0.0,
            )
        finer = counts.over_range(low, high)
        if finer.width >= counts.width:
            break
        finer.add_all(search.rows())
        counts, separation = finer, _separation(search, finer)
    return separation


def _separation(search: Search, counts: PairCounts) -> PairSeparation:
    same, different = (each[counts.filled()].double() for each in (counts.same, counts.different))
    totals = int(same.sum()), int(different.sum())
    means = _means(search, *totals)
    ranking = _ranking(counts, same, different) if all(totals) else _Ranking()
    return PairSeparation(
        same_mean=means[0],
        same_std=counts.width * _std(same, counts.filled()),
        different_mean=means[1],
        different_std=counts.width * _std(different, counts.filled()),
        gap=means[0] - means[1],
        num_same=totals[0],
        num_different=totals[1],
        **ranking._asdict(),
    )


def _means(search: Search, num_same: int, num_different: int) -> tuple[float, float]:
    """Mean similarity of either kind of pair, from the sums of each class."""
    size = len(search.counts)
    classes = group_by_slot(search.classes, size)
    items = class_sums(search.items, classes)
    if search.own:
        own = class_squares(search.items, classes)
        same = (items.square().sum(dim=1) - own).sum() / 2
        total = (items.sum(dim=0).square().sum() - own.sum()) / 2
    else:
        queries = class_sums(search.queries, group_by_slot(search.query_classes, size))
        same = (queries * items).sum()
        total = queries.sum(dim=0) @ items.sum(dim=0)
    if search.slots is not None and search.query_slots is not None:
        left_out = _left_out(search, search.slots, search.query_slots)
        same, total = same - left_out, total - left_out
    return (
        float(same) / num_same if num_same else math.nan,
        float(total - same) / num_different if num_different else math.nan,
    )


def _left_out(search: Search, slots: Tensor, query_slots: Tensor) -> Tensor:
    """Sum of the similarities of the pairs that don't count."""
    size = int(slots.max()) + 2  # the last is for what has no slot
    of_items = group_by_slot(slots.where(slots >= 0, size - 1), size)
    items = class_sums(search.items, of_items)[:-1]
    if search.own:
        squares = class_squares(search.items, of_items)[:-1]
        return (items.square().sum() - squares.sum()) / 2
    of_queries = group_by_slot(query_slots.where(query_slots >= 0, size - 1), size)
    return (class_sums(search.queries, of_queries)[:-1] * items).sum()


def _std(counts: Tensor, bins: Tensor) -> float:
    """Population standard deviation, in bins."""
    mean = (counts * bins).sum() / counts.sum()
    return float(((counts * (bins - mean).square()).sum() / counts.sum()).sqrt())


class _Ranking(NamedTuple):
    """What `PairSeparation` has of the order of the pairs."""

    roc_auc: float = math.nan
    roc_auc_error: float = math.nan
    average_precision: float = math.nan
    average_precision_error: float = math.nan
    best_threshold: float = math.nan
    balanced_accuracy: float = math.nan
    balanced_accuracy_error: float = math.nan


def _ranking(counts: PairCounts, same: Tensor, different: Tensor) -> _Ranking:
    """Of the pairs in each filled bin, float64 ``[F]``, as what follows takes them, too."""
    auc, auc_error = _roc_auc(same, different)
    precision, precision_error = _average_precision(same, different)
    edge, accuracy, accuracy_error = _best_edge(same, different, counts.filled())
    ranking = _Ranking(
        roc_auc=auc,
        roc_auc_error=auc_error,
        average_precision=precision,
        average_precision_error=precision_error,
        best_threshold=counts.low + counts.width * edge,
        balanced_accuracy=accuracy,
        balanced_accuracy_error=accuracy_error,
    )
    if counts.exact():
        return ranking._replace(
            roc_auc_error=0.0, average_precision_error=0.0, balanced_accuracy_error=0.0
        )
    return ranking


def _roc_auc(same: Tensor, different: Tensor) -> tuple[float, float]:
    """Area under the curve with pairs of one bin tied, and the most that their order changes."""
    below = different.cumsum(0) - different
    pairs = same.sum() * different.sum()
    tied = (same * different).sum() / 2
    return float(((same * below).sum() + tied) / pairs), float(tied / pairs)


def _average_precision(same: Tensor, different: Tensor) -> tuple[float, float]:
    """Average precision with pairs of one bin in random order, and the most that it changes."""
    relevant, others = same.flip(0), different.flip(0)
    tied = relevant + others
    relevant_above, above = relevant.cumsum(0) - relevant, tied.cumsum(0) - tied

    def in_a_row(others_above: Tensor) -> Tensor:
        """Sum of the precisions where all relevant ones of a bin follow each other."""
        start = relevant_above + others_above
        return relevant - others_above * (harmonic(start + relevant) - harmonic(start))

    others_above = above - relevant_above
    expected = relevant * expected_precision(above, tied, relevant_above, relevant, tied)
    best, worst = in_a_row(others_above), in_a_row(others_above + others)
    mean, low, high = (float(part.sum() / same.sum()) for part in (expected, worst, best))
    return mean, max(high - mean, mean - low, 0.0)


def _best_edge(same: Tensor, different: Tensor, bins: Tensor) -> tuple[float, float, float]:
    """Edge of bins with the best balanced accuracy, that, and how much better another place is."""
    same_above = same.sum() - _before(same)
    accuracy = (same_above / same.sum() + _before(different) / different.sum()) / 2
    best = int(accuracy.argmax())
    last = best + int((accuracy[best:] == accuracy[best]).long().cumprod(0).sum()) - 1
    # The middle of the edges that are as good, with no pair between them, is farthest from both.
    low = int(bins[best - 1]) + 1 if best else 0
    high = int(bins[last]) if last < len(bins) else BINS
    # Within a bin, at most all that a move from one of its edges can gain.
    within = torch.minimum(
        accuracy[:-1] + different / different.sum() / 2, accuracy[1:] + same / same.sum() / 2
    )
    error = (within.max() - accuracy[best]).clamp_min(0)
    return (low + high) / 2, float(accuracy[best]), float(error)


def _before(counts: Tensor) -> Tensor:
    """Pairs in front of each filled bin and behind the last, ``[F + 1]``."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def pair_separation(embeddings: Any, labels: Any) -> PairSeparation:
    """How well similarity tells pairs of one class from pairs of different classes.

    Over all ``N * (N - 1) / 2`` pairs. They are counted in 2**20 bins of similarity, so memory
    doesn't grow with their number; where that leaves the ROC AUC or the average precision
    uncertain by more than 1e-4, as in a nearly collapsed tower, they are counted again in bins
    over the range that they have.
    Means don't depend on bins.

    Args:
        embeddings: Shape ``[N, D]``, floating point, any length.
        labels: Class of each row, shape ``[N]``, integer.

    Returns:
        The metrics, NaN where a kind of pair that they need isn't there.

    Raises:
        ValueError: If shapes don't fit or an embedding is not finite.
        TypeError: If embeddings are not floating point or labels not integers.

    Example:
        >>> import torch
        >>> from pairclip.retrieval import pair_separation
        >>> embeddings = torch.tensor([[1.0, 0.0], [4.0, 3.0], [0.0, 1.0]])
        >>> pairs = pair_separation(embeddings, torch.tensor([0, 0, 1]))
        >>> round(pairs.same_mean, 3), round(pairs.different_mean, 3), pairs.roc_auc
        (0.8, 0.3, 1.0)
    """
    search = prepare(embeddings, labels)
    counts = PairCounts(search)
    counts.add_all(search.rows())
    return separate(search, counts)
