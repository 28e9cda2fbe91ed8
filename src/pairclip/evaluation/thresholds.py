"""From which similarity on two images are called of one class, and how sure that is elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pairclip import _checks
from pairclip.evaluation.histogram import FloatArray, IntArray
from pairclip.retrieval.blocks import Block, Search, over_blocks, prepare
from pairclip.retrieval.pair_counts import PairCounts

_RESAMPLES = 1000
# Classes are drawn in as many groups at most, and thresholds are looked at in as many places; the
# products of these three are what is held in memory.
_MOST_GROUPS = 200
_PLACES = 64
# False match rates that a draw of classes may have at the threshold, as multiples of the wanted.
_WIDEST = 16.0
# Draws left out at either end. The middle 95 % of them held the rate of other classes in 92 to 95 %
# of the halves of a real collection: what is drawn holds no classes more alike than those given.
_TAIL = 0.01


@dataclass(frozen=True, eq=False)
class Threshold:
    """A similarity from which to call two images the same class.

    Attributes:
        threshold: The lowest cosine at which at most the wanted share of the pairs of different
            classes is called the same.
        interval: Where the threshold would lie had other classes been drawn, at least 95 %.
        false_match_rate: Share of the pairs of different classes at or above the threshold.
        false_match_interval: Where the false match rate at a threshold that was chosen like this
            lies on as many *other* classes, at least 95 %: what to expect in use.
        match_rate: Share of the pairs of one class at or above the threshold.
        classes: Id of each class, int64 ``[C]``, ascending.
        class_match_rates: `match_rate` of the pairs of each class, float64 ``[C]``; NaN for a
            class of one image.
        class_false_match_rates: `false_match_rate` of the pairs of each class with the others.
    """

    threshold: float
    interval: tuple[float, float]
    false_match_rate: float
    false_match_interval: tuple[float, float]
    match_rate: float
    classes: IntArray = field(repr=False)
    class_match_rates: FloatArray = field(repr=False)
    class_false_match_rates: FloatArray = field(repr=False)


def choose_threshold(
    embeddings: Any, labels: Any, *, false_match_rate: float = 0.01, seed: int = 0
) -> Threshold:
    """Choose the similarity from which two images are called the same class, or "no match".

    Pairs that share a class are not independent: two classes that look alike give thousands of
    false matches at once. So the intervals come from a bootstrap over *classes*; of more than 200
    classes, over 200 groups of them. With few classes they are wide, and widened as for a mean of
    so few. Take images, and better still classes, that the tower was not trained on.

    Args:
        embeddings: Shape ``[N, D]``, floating point, any length.
        labels: Class of each row, shape ``[N]``, integer.
        false_match_rate: Share of the pairs of different classes that may be called the same, in
            ``(0, 1)``.
        seed: Of the draws of classes.

    Returns:
        The threshold, how sure it is, and what it does to each class.

    Raises:
        ValueError: If `false_match_rate` is out of range or less than one pair, shapes don't fit,
            an embedding is not finite, there are fewer than three classes, or no class has two
            rows.

    Example:
        >>> import torch
        >>> from pairclip import choose_threshold
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(200) % 20
        >>> rows = torch.randn(20, 16, generator=generator)[labels]
        >>> rows += 0.5 * torch.randn(200, 16, generator=generator)
        >>> chosen = choose_threshold(rows, labels, false_match_rate=0.01)
        >>> chosen.false_match_rate <= 0.01, chosen.match_rate > 0.9
        (True, True)

    References:
        Snijders and Borgatti 1999, "Non-parametric standard errors and tests for network
        statistics", for drawing the ends of pairs; Hesterberg 2015, "What teachers should know
        about the bootstrap", for widening the intervals (expanded percentiles).
    """
    _checks.check_in("(0, 1)", "false_match_rate", false_match_rate)
    _checks.check_count("seed", seed)
    search = prepare(embeddings, labels)
    sizes = search.counts[:-1].double()
    pairs = PairCounts(search)
    pairs.add_all(search.rows())
    num_different, num_same = int(pairs.different.sum()), int(pairs.same.sum())
    if len(sizes) < 3 or not num_same:
        raise ValueError(
            f"`labels` must have at least three classes, and one of two rows, got {len(sizes)} "
            f"classes and {num_same} pairs of one class."
        )
    wanted = false_match_rate * num_different
    if wanted < 1:
        raise ValueError(
            f"`false_match_rate` {false_match_rate} is less than one of the {num_different} pairs "
            f"of different classes. Take more rows, or at least {1 / num_different:.2g}."
        )
    generator = np.random.default_rng(seed)
    places, chosen = _places(pairs, wanted)
    groups = torch.arange(len(sizes), device="cpu")
    if len(sizes) > _MOST_GROUPS:
        groups = torch.from_numpy(generator.permutation(len(sizes)) % _MOST_GROUPS)
    matches = _Matches(search, places, chosen, groups.to(sizes.device))
    for _ in over_blocks(search, search.rows(), matches.add):
        pass
    thresholds, rates = _draws(matches, sizes, places, false_match_rate, generator)
    same, false = matches.same.double(), matches.false.double()
    of_one = sizes * (sizes - 1) / 2
    return Threshold(
        threshold=float(places[chosen]),
        interval=_middle(thresholds, matches.size),
        false_match_rate=float(false.sum()) / 2 / num_different,
        false_match_interval=_middle(rates, matches.size),
        match_rate=float(same.sum()) / num_same,
        classes=_checks.as_labels("labels", labels).unique().cpu().numpy(),
        class_match_rates=(same / of_one).cpu().numpy(),
        class_false_match_rates=(false / (sizes * (sizes.sum() - sizes))).cpu().numpy(),
    )


def _places(pairs: PairCounts, wanted: float) -> tuple[Tensor, int]:
    """Similarities around the threshold, float64 ascending, and which of them is the threshold.

    At each, at most a multiple of the wanted number of false matches is at or above it.
    """
    above = pairs.different.flip(0).cumsum(0).flip(0)  # pairs from each edge on, falling
    multiples = np.logspace(math.log2(_WIDEST), -math.log2(_WIDEST), _PLACES + 1, base=2.0)
    falling = -above.double().cpu()
    edges = torch.searchsorted(falling, torch.from_numpy(-wanted * multiples))
    edges = torch.cat([edges, edges[:1] - 1]).unique()  # two at least, to go between
    threshold = int(torch.searchsorted(falling, -wanted))
    # Behind the last bin is behind all that rounding may have put above 1, too.
    values = pairs.low + pairs.width * edges.where(edges < len(above), len(above) + 2).double()
    return values, int((edges == threshold).nonzero()[0, 0])


class _Matches:
    """Pairs at or above each place, of each two groups of classes, and of each class."""

    def __init__(self, search: Search, places: Tensor, chosen: int, groups: Tensor) -> None:
        self.search, self.groups, self.chosen = search, groups, chosen
        self.places = places.to(search.items)
        self.size = int(groups.max()) + 1
        self.count = groups.new_zeros(self.size * self.size * len(places))
        # Of each class: its own pairs from the threshold on, and those with other classes.
        self.same, self.false = torch.zeros_like(groups), torch.zeros_like(groups)
        self._adding = Lock()

    def add(self, block: Block) -> None:
        """Count the pairs of these queries, each pair once."""
        columns = torch.arange(block.scores.shape[1], device=block.rows.device)
        high = (block.scores >= self.places[0]) & (columns > block.rows[:, None])
        rows, columns = high.nonzero(as_tuple=True)
        place = torch.searchsorted(self.places, block.scores[rows, columns], right=True) - 1
        one, other = self.search.classes[block.rows[rows]], self.search.classes[columns]
        matched, same = place >= self.chosen, one == other
        key = (self.groups[one] * self.size + self.groups[other]) * len(self.places) + place
        classes = len(self.groups)
        false = torch.cat([each[matched & ~same] for each in (one, other)])
        with self._adding:
            self.count += key[~same].bincount(minlength=len(self.count))
            self.same += one[matched & same].bincount(minlength=classes)
            self.false += false.bincount(minlength=classes)

    def between_groups(self) -> Tensor:
        """False matches from each place on, float64 ``[places, G, G]``, each pair twice."""
        counts = self.count.view(self.size, self.size, len(self.places)).double()
        of_pairs = counts.flip(2).cumsum(2).flip(2).permute(2, 0, 1)
        return of_pairs + of_pairs.transpose(1, 2)


def _draws(
    matches: _Matches,
    sizes: Tensor,
    places: Tensor,
    false_match_rate: float,
    generator: np.random.Generator,
) -> tuple[FloatArray, FloatArray]:
    """Thresholds of drawn classes, and false match rates of others at these."""
    groups = matches.size
    drawn = torch.from_numpy(
        generator.multinomial(groups, np.full(groups, 1 / groups), _RESAMPLES)
    ).double()
    of_group = torch.zeros(groups, dtype=torch.float64, device="cpu")
    squares = of_group.clone()
    of_group.index_add_(0, matches.groups.cpu(), sizes.cpu())
    squares.index_add_(0, matches.groups.cpu(), sizes.cpu().square())
    pairs = of_group[:, None] * of_group
    pairs.diagonal().sub_(squares)
    totals = ((drawn @ pairs) * drawn).sum(dim=1)
    # A draw of one class alone has no pair of different ones.
    drawn, totals = drawn[totals > 0], totals[totals > 0]
    rates = torch.stack(
        [
            ((drawn @ of_place) * drawn).sum(dim=1) / totals
            for of_place in matches.between_groups().cpu()
        ],
        dim=1,
    )
    # Where a draw has no false match, a tenth of one stands for the logarithm.
    least = 0.2 / float(pairs.sum())
    logarithms = rates.clamp_min(least).log()
    low = (logarithms > math.log(false_match_rate)).sum(dim=1, keepdim=True) - 1
    low = low.clamp(0, len(places) - 2)
    above, below = logarithms.gather(1, low), logarithms.gather(1, low + 1)
    part = ((above - math.log(false_match_rate)) / (above - below).clamp_min(1e-12)).clamp(0, 1)
    thresholds = torch.lerp(places[low], places[low + 1], part)
    elsewhere = logarithms.roll(1, 0)
    at = torch.lerp(elsewhere.gather(1, low), elsewhere.gather(1, low + 1), part).exp()
    at[at < 2 * least] = 0
    return thresholds[:, 0].numpy(), at[:, 0].numpy()


def _middle(values: FloatArray, drawn: int) -> tuple[float, float]:
    """The middle of what draws of so many gave, expanded as Student's t is for so few."""
    tail = stats.norm.cdf(stats.t.ppf(_TAIL, drawn - 1) * math.sqrt(drawn / (drawn - 1)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
