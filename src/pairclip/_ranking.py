"""Figures of a query from the ranks of its relevant items.

Items of equal similarity count as the expectation over their random order (McSherry and Najork
2008, "Computing information retrieval performance measures efficiently in the presence of tied
scores"), so that a collapsed tower gets what chance gives it, whatever the order of the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairclip._blocks import Block, Search

# Rows sorted at once on one thread: few enough for the processor's cache.
_ROWS = 32


class Ranks(NamedTuple):
    """Where the relevant items of each query stand among all; its best one is the last.

    All are float64, so that no figure needs to convert them.
    """

    above: Tensor  # [b, r] items of a higher score; infinite in front, with fewer than r relevant
    tied: Tensor  # [b, r] items of the same score, itself included
    found: Tensor  # [b, r] relevant items of a higher score
    found_tied: Tensor  # [b, r] relevant items of the same score, itself included
    total: Tensor  # [b] relevant items


def rank(block: Block, total: Tensor, first: int | None = None) -> Ranks:
    """Rank the relevant items of each query, from one sort, which overwrites the scores.

    `total` are its relevant items, ``[b]``. Of `first` places at least the ranks are given; None
    stands for all.
    """
    ordered, places, tied = _ascending(block, first)
    rows, width = ordered.shape
    stops = torch.arange(1, rows + 1, device=ordered.device) * width
    counts = torch.searchsorted(places, stops).diff(prepend=stops.new_zeros(1))
    most = max(int(counts.max()), 1)
    column = torch.arange(most, device=ordered.device)
    counted = column >= most - counts[:, None]
    at = torch.full_like(counted, -torch.inf, dtype=torch.float64)
    above = stops[:, None] - 1 - at.masked_scatter_(counted, places.double())
    ranks = Ranks(
        above=above,
        tied=torch.ones_like(above),
        found=(most - 1 - column).double().repeat(rows, 1),
        found_tied=torch.ones_like(above),
        total=total.double(),
    )
    if tied.any():
        _count_ties(ranks, ordered, places, tied, most - counts.cumsum(0))
    return ranks


def _ascending(block: Block, first: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of each query's items, ascending, and of the relevant ones two things.

    A key is an integer that orders as the score does, times two, and one more for a relevant
    item: equal scores stay together, and one sort says where the relevant ones are. The keys take
    the place of the scores.

    Returns:
        The keys, ``[b, n]``; the places in the flat keys of the relevant items, ascending; whether
        each has the same score as the item before it.
    """
    scores = block.scores
    keys = scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    size = _ROWS if _on_cpu(scores) else len(scores)
    split = [each.split(size) for each in (scores, keys, block.members)]
    parts = [_sort(*part, first=first) for part in zip(*split, strict=True)]
    starts = range(0, keys.numel(), size * keys.shape[1])
    places = torch.cat([start + part[0] for start, part in zip(starts, parts, strict=True)])
    return keys, places, torch.cat([part[1] for part in parts])


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _sort(
    scores: Tensor, keys: Tensor, members: Tensor, *, first: int | None
) -> tuple[Tensor, Tensor]:
    # Of numbers between -2 and 2, the bits become even integers of the same order.
    scores += 0  # -0.0 becomes 0.0
    width = 8 * keys.itemsize - 1
    keys ^= (keys >> width).bitwise_and_(2**width - 1)
    keys <<= 1
    mine = keys.gather(1, members)
    keys.scatter_(1, members, mine | (mine > keys[:, -1:]))
    if _on_cpu(keys):
        # NumPy sorts with SIMD instructions, about 30 times as fast as torch.
        keys.numpy().sort(axis=1)
    else:
        keys.copy_(keys.sort(dim=1).values)
    start = _start(keys, first)
    relevant = (keys[:, start:] & 1).bool().flatten()
    if _on_cpu(keys):
        places = torch.from_numpy(np.flatnonzero(relevant.numpy()))
    else:
        places = relevant.nonzero()[:, 0]
    if start:
        places += start * (places // (keys.shape[1] - start) + 1)
    flat = keys.flatten()
    mine, before = (flat.index_select(0, places - step) >> 1 for step in (0, 1))
    return places, mine == before


def _start(keys: Tensor, first: int | None) -> int:
    """Column from which the `first` places of each row are, between different scores."""
    columns = keys.shape[1]
    while first is not None and first < columns - 1:
        start = columns - first
        before, after = (keys[:, start - step] >> 1 for step in (1, 0))
        if not (before == after).any():
            return start
        first *= 2
    return 0


def _count_ties(
    ranks: Ranks, ordered: Tensor, places: Tensor, tied: Tensor, shifts: Tensor
) -> None:
    """Correct the ranks of items of equal score, which have so far been told apart.

    An item's column in a row's ranks is its place among all of `places`, plus the row's shift.
    """
    rows, width = ordered.shape
    flat = ordered.flatten()
    # The first of a run is not like the one before it. One too many does no harm.
    several = tied.clone()
    several[:-1] |= tied[1:]
    which = several.nonzero()[:, 0]
    row, keys = places[which] // width, flat[places[which]]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row[1:] != row[:-1]) | (keys[1:] != keys[:-1])
    starts = first.nonzero()[:, 0]
    lengths = starts.diff(append=starts.new_full((1,), len(row)))
    # How many items are below, by a search for one place in front of the row for each run.
    of_run = row[starts]
    place = torch.arange(len(starts), device=row.device) - torch.searchsorted(of_run, of_run)
    wanted = ordered.new_zeros(rows, int(place.max()) + 1)
    wanted[of_run, place] = keys[starts] - 1
    below = torch.searchsorted(ordered, wanted)[of_run, place]
    # Relevant items stand behind the others of their score: the last one has the rank of all.
    column = which + shifts[row]
    last = column[starts + lengths - 1]
    above = ranks.above[of_run, last]
    for figure, value in (
        (ranks.above, above),
        (ranks.tied, width - above - below),
        (ranks.found, ranks.found[of_run, last]),
        (ranks.found_tied, lengths),
    ):
        figure[row, column] = value.double().repeat_interleave(lengths)


def hit(ranks: Ranks, k: int) -> Tensor:
    """Chance that one of the k nearest is relevant, float64 ``[b]``.

    Of the t items tied with the best relevant one, r are relevant and s have a place among the
    k: the chance is 1 - C(t - r, s) / C(t, s).
    """
    above, tied, relevant = (part[:, -1] for part in (ranks.above, ranks.tied, ranks.found_tied))
    places = torch.minimum(k - above, tied).clamp_min(0)
    missed = (_log_choose(tied - relevant, places) - _log_choose(tied, places)).exp()
    return 1 - missed * (tied - relevant >= places)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    k = torch.minimum(n, k)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def precision(ranks: Ranks, k: int) -> Tensor:
    """Expected share of relevant items among the k nearest, float64 ``[b]``."""
    return _expected_within(ranks, torch.full_like(ranks.total, k)) / k


def r_precision(ranks: Ranks) -> Tensor:
    """The same among as many as the query has relevant items."""
    return _expected_within(ranks, ranks.total) / ranks.total


def _expected_within(ranks: Ranks, places: Tensor) -> Tensor:
    """Expected number of relevant items in the first places."""
    return (_places_within(ranks, places) / ranks.tied).sum(dim=1)


def _places_within(ranks: Ranks, places: Tensor) -> Tensor:
    """How many of the first places fall to the items of the same score."""
    return torch.minimum((places[:, None] - ranks.above).clamp_min(0), ranks.tied)


def average_precision(ranks: Ranks) -> Tensor:
    """Expected average precision over all relevant items, float64 ``[b]``."""
    return _precision_within(ranks, ranks.tied)


def map_at_r(ranks: Ranks) -> Tensor:
    """The same, but relevant items count only within the first R places, R of them in all."""
    return _precision_within(ranks, _places_within(ranks, ranks.total))


def _precision_within(ranks: Ranks, places: Tensor) -> Tensor:
    return expected_precision(*ranks[:4], places).sum(dim=1) / ranks.total


def expected_precision(
    above: Tensor, tied: Tensor, found: Tensor, found_tied: Tensor, places: Tensor
) -> Tensor:
    """Expected "relevant here, times the precision here", summed over places of a tied group.

    At place j of t tied items, r of them relevant, behind n others with m relevant ones, it is
    ``(r / t) * (m + 1 + (j - 1) * (r - 1) / (t - 1)) / (n + j)``. The sum over the first `places`
    is returned for each of the r, that is, divided by r.
    """
    expected = (found + 1) / (above + 1) * (places / tied)
    several = (places > 1).nonzero(as_tuple=True)
    if len(several[0]):
        n, t, m, r, stop = (part[several] for part in (above, tied, found, found_tied, places))
        inverse = harmonic(n + stop) - harmonic(n)  # sum of 1 / (n + j)
        more = (r - 1) / (t - 1)
        expected[several] = ((m + 1) * inverse + more * (stop - (n + 1) * inverse)) / t
    return expected


def harmonic(n: Tensor) -> Tensor:
    """Sum of 1 / i for i up to n, but for a constant."""
    value: Tensor = torch.special.digamma(n + 1)
    return value


def vote(search: Search, block: Block, nearest: tuple[Tensor, Tensor], k: int) -> Tensor:
    """Chance that each query's class wins the vote of its k nearest, float64 ``[b]``.

    `nearest` has the scores and columns of at least one item more.
    """
    scores, columns = nearest
    last = scores[:, k - 1 : k + 1]
    classes = search.classes.new_zeros(block.scores.shape[1])  # the filling has no votes
    classes[: len(search.classes)] = search.classes
    votes = scores.new_zeros(len(scores), len(search.counts), dtype=torch.float64)
    votes.scatter_add_(1, classes[columns[:, :k]], torch.ones_like(votes[:, :1]).expand(-1, k))
    # Where more compete for the last places, each has its chance of one.
    crowded = last[:, 0] == last[:, 1]
    if crowded.any():
        lowest = last[crowded, :1]
        sure, tied = block.scores[crowded] > lowest, block.scores[crowded] == lowest
        places = k - sure.sum(dim=1, keepdim=True)
        weight = sure + tied * (places / tied.sum(dim=1, keepdim=True).double())
        votes[crowded] = torch.zeros_like(votes[crowded]).scatter_add_(
            1, classes.expand(weight.shape), weight
        )
    best = votes.max(dim=1).values
    # Weights are sums of fractions: equal votes may differ in their last bits.
    winners = votes >= best[:, None] - 1e-9
    mine = winners.gather(1, search.query_classes[block.rows][:, None])[:, 0]
    return mine / winners.sum(dim=1).double()
