"""Figures of a query from the ranks of its relevant items.

Items of equal similarity count as the expectation over their random order (McSherry and Najork
2008, "Computing information retrieval performance measures efficiently in the presence of tied
scores"), so that a collapsed tower gets what chance gives it, whatever the order of the rows.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairclip._blocks import Block, Search


class Ranks(NamedTuple):
    """Where the relevant items of each query stand among all; its best one is the last.

    All are float64, so that no figure needs to convert them.
    """

    above: Tensor  # [b, r] items of a higher score
    tied: Tensor  # [b, r] items of the same score, itself included
    found: Tensor  # [b, r] relevant items of a higher score
    found_tied: Tensor  # [b, r] relevant items of the same score, itself included
    counted: Tensor  # [b, r] bool: False in front, where a query has fewer relevant items
    total: Tensor  # [b] relevant items


def rank(block: Block) -> Ranks:
    """Rank the relevant items of each query, from one sort of its scores."""
    scores = _ascending(block.scores)
    relevant = _ascending(block.scores.gather(1, block.members))
    found, found_tied = _runs(relevant)
    last = torch.searchsorted(scores, relevant, right=True)
    tied = _tied(scores, relevant, found_tied, last)
    counted = relevant > -torch.inf
    return Ranks(
        above=(scores.shape[1] - last).double(),
        tied=tied.double(),
        found=found.double(),
        found_tied=found_tied.double(),
        counted=counted,
        total=counted.sum(dim=1).double(),
    )


def _ascending(scores: Tensor) -> Tensor:
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values
    # NumPy sorts with SIMD instructions, about 30 times as fast as torch.
    ordered = scores.contiguous().numpy().copy()
    parts = np.array_split(ordered, torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: part.sort(axis=1), parts))
    return torch.from_numpy(ordered)


def _runs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores of its ascending row are above each one, and how many equal it."""
    first = torch.ones_like(scores, dtype=torch.bool)
    first[:, 1:] = scores[:, 1:] != scores[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    stops = torch.cat([starts[1:], starts.new_full((1,), scores.numel())])
    run = first.flatten().cumsum(0).view_as(scores) - 1
    rows, width = scores.shape
    row_stops = width * torch.arange(1, rows + 1, device=scores.device)[:, None]
    return row_stops - stops[run], (stops - starts)[run]


def _tied(scores: Tensor, relevant: Tensor, found_tied: Tensor, last: Tensor) -> Tensor:
    """How many ascending scores equal each relevant one, which `found_tied` relevant ones do."""
    before = (last - found_tied - 1).clamp_min(0)
    others = scores.gather(1, before) == relevant
    if not others.any():
        return found_tied
    # Few are tied with others, so only these are searched for: in front of a row each.
    row, column = others.nonzero(as_tuple=True)
    place = others.cumsum(dim=1)[row, column] - 1
    wanted = relevant.new_zeros(len(relevant), int(place.max()) + 1)
    wanted[row, place] = relevant[row, column]
    first = torch.searchsorted(scores, wanted)
    tied = found_tied.clone()
    tied[row, column] = last[row, column] - first[row, place]
    return tied


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
    share = _places_within(ranks, places) / ranks.tied
    return share.where(ranks.counted, 0).sum(dim=1)


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
    found = expected_precision(*ranks[:4], places)
    return found.where(ranks.counted, 0).sum(dim=1) / ranks.total


def expected_precision(
    above: Tensor, tied: Tensor, found: Tensor, found_tied: Tensor, places: Tensor
) -> Tensor:
    """Expected "relevant here, times the precision here", summed over places of a tied group.

    At place j of t tied items, r of them relevant, behind n others with m relevant ones, it is
    ``(r / t) * (m + 1 + (j - 1) * (r - 1) / (t - 1)) / (n + j)``. The sum over the first `places`
    is returned for each of the r, that is, divided by r.
    """
    expected = (found + 1) / (above + 1) * (places / tied)
    several = places > 1
    if several.any():
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
