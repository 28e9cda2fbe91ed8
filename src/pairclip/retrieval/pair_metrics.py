"""How far pairs of one class and pairs of different classes are apart, from histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip._vectors import class_squares, class_sums, group_by_slot
from pairclip.retrieval.blocks import Block, Search, over_blocks, prepare
from pairclip.retrieval.query_metrics import expected_precision, harmonic

BINS = 1 << 20
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


class PairCounts:
    """Pairs of a search, in equal bins of similarity; each pair of items is counted once."""

    def __init__(self, search: Search, low: float = -1.0, width: float = 2 / BINS) -> None:
        self.low, self.width = low, width
        self._search = search
        self._all: Tensor = search.counts.new_zeros(BINS)
        self.same: Tensor = search.counts.new_zeros(BINS)
        self._adding = Lock()

    @property
    def different(self) -> Tensor:
        """Pairs of different classes in each bin, int64."""
        different: Tensor = self._all - self.same
        return different

    def add(self, block: Block) -> None:
        """Count the pairs of these queries."""
        bins = (block.scores - self.low).mul_(1 / self.width).clamp_(0, BINS - 1).to(torch.int32)
        bins[:, len(self._search.items) :] = BINS
        if self._search.own:
            columns = torch.arange(bins.shape[1], device=bins.device)
            bins.masked_fill_(columns <= block.rows[:, None], BINS)
        every, same = _counts(bins), _counts(bins.gather(1, block.members))
        with self._adding:
            self._all += every
            self.same += same

    def add_all(self, rows: Tensor) -> None:
        """Count the pairs of all these queries."""
        for _ in over_blocks(self._search, rows, self.add):
            pass

    def coarse(self, bins: int = 200) -> tuple[Tensor, Tensor, Tensor]:
        """Edges of fewer bins, float64, and the pairs of one class and of two in each, int64."""
        edges = torch.linspace(0, BINS, bins + 1, dtype=torch.float64)
        sizes = edges.round().long().diff().tolist()
        same, different = (
            torch.stack([part.sum() for part in counts.split(sizes)])
            for counts in (self.same, self.different)
        )
        return self.low + self.width * edges, same, different

    def finer(self) -> PairCounts:
        """No counts yet, of bins over the range in which there are pairs."""
        first, last = self._filled()
        # Powers of two, so that no similarity is rounded into another bin; a bin more on either
        # side for similarities that rounding has put beyond 1.
        width = self.width * 2.0 ** math.ceil(math.log2(last - first + 3)) / BINS
        return PairCounts(self._search, self.low + (first - 1) * self.width, width)

    def exact(self) -> bool:
        """Whether bins are too narrow for two different similarities."""
        first, last = self._filled()
        low, high = self.low + first * self.width, self.low + (last + 1) * self.width
        if low * high <= 0:
            return False
        exponent = math.frexp(min(abs(low), abs(high)))[1] - 1
        return self.width <= torch.finfo(self._search.items.dtype).eps * 2.0**exponent

    def _filled(self) -> tuple[int, int]:
        filled = self._all.nonzero()
        return int(filled[0]), int(filled[-1])


def _counts(bins: Tensor) -> Tensor:
    return torch.bincount(bins.flatten(), minlength=BINS + 1)[:BINS]


def separate(search: Search, counts: PairCounts) -> PairSeparation:
    """Metrics of these counts; the pairs are counted again if the bins are too coarse."""
    separation = _separation(search, counts)
    while max(separation.roc_auc_error, separation.average_precision_error) > _TOLERANCE:
        finer = counts.finer()
        if finer.width >= counts.width:
            break
        finer.add_all(search.rows())
        counts, separation = finer, _separation(search, finer)
    return separation


def _separation(search: Search, counts: PairCounts) -> PairSeparation:
    same, different = counts.same, counts.different
    totals = int(same.sum()), int(different.sum())
    means = _means(search, *totals)
    ranking = _ranking(counts, same.double(), different.double()) if all(totals) else _Ranking()
    return PairSeparation(
        same_mean=means[0],
        same_std=counts.width * _std(same),
        different_mean=means[1],
        different_std=counts.width * _std(different),
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
    return (
        float(same) / num_same if num_same else math.nan,
        float(total - same) / num_different if num_different else math.nan,
    )


def _std(counts: Tensor) -> float:
    """Population standard deviation, in bins."""
    place = torch.arange(BINS, dtype=torch.float64, device=counts.device)
    mean = (counts * place).sum() / counts.sum()
    return float(((counts * (place - mean).square()).sum() / counts.sum()).sqrt())


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
    auc, auc_error = _roc_auc(same, different)
    precision, precision_error = _average_precision(same, different)
    edge, accuracy, accuracy_error = _best_edge(same, different)
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
    filled = (same + different).nonzero().flip(0)[:, 0]
    relevant, others = same[filled], different[filled]
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


def _best_edge(same: Tensor, different: Tensor) -> tuple[float, float, float]:
    """Edge of bins with the best balanced accuracy, that, and how much better another place is."""
    same_above = same.sum() - _before(same)
    accuracy = (same_above / same.sum() + _before(different) / different.sum()) / 2
    best = int(accuracy.argmax())
    # No pair is between here and the last edge that is as good: the middle is farthest from both.
    last = best + int((accuracy[best:] == accuracy[best]).long().cumprod(0).sum()) - 1
    # Within a bin, at most all that a move from one of its edges can gain.
    within = torch.minimum(
        accuracy[:-1] + different / different.sum() / 2, accuracy[1:] + same / same.sum() / 2
    )
    error = (within.max() - accuracy[best]).clamp_min(0)
    return (best + last) / 2, float(accuracy[best]), float(error)


def _before(counts: Tensor) -> Tensor:
    """Pairs below each edge, from the first to the last, ``[BINS + 1]``."""
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
