"""Formulas of the metrics of a query, from the ranks of its relevant items or its nearest ones.

Items of equal similarity count as the expectation over their random order (McSherry and Najork
2008, "Computing information retrieval performance measures efficiently in the presence of tied
scores"), so that a collapsed tower gets what chance gives it, whatever the order of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip.retrieval.blocks import NO_ITEM, Block, Search
from pairclip.retrieval.ranks import Ranks


def hit(ranks: Ranks, k: float) -> Tensor:
    """Chance that one of the k nearest is relevant, float64 ``[b]``.

    Of the t items tied with the best relevant one, r are relevant and s have a place among the
    k: the chance is 1 - C(t - r, s) / C(t, s).
    """
    above, tied, relevant = (part[:, -1] for part in (ranks.above, ranks.tied, ranks.relevant_tied))
    places = torch.minimum(k - above, tied).clamp_min(0)
    missed = (_log_choose(tied - relevant, places) - _log_choose(tied, places)).exp()
    return 1 - missed * (tied - relevant >= places)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    k = torch.minimum(n, k)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def precision(ranks: Ranks, k: float) -> Tensor:
    """Expected share of relevant items among the k nearest, float64 ``[b]``."""
    return _expected_within(ranks, torch.full_like(ranks.total, k)) / k


def r_precision(ranks: Ranks) -> Tensor:
    """Expected share of relevant items among the R nearest, R being all that there are."""
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
    """Expected average precision within the first R places, R being all relevant items."""
    return _precision_within(ranks, _places_within(ranks, ranks.total))


def _precision_within(ranks: Ranks, places: Tensor) -> Tensor:
    at_each = expected_precision(
        ranks.above, ranks.tied, ranks.relevant_above, ranks.relevant_tied, places
    )
    return at_each.sum(dim=1) / ranks.total


def expected_precision(
    above: Tensor,
    tied: Tensor,
    relevant_above: Tensor,
    relevant_tied: Tensor,
    places: Tensor,
) -> Tensor:
    """Expected "relevant here, times the precision here", summed over places of a tied group.

    At place j of t tied items, r of them relevant, behind n others with m relevant ones, it is
    ``(r / t) * (m + 1 + (j - 1) * (r - 1) / (t - 1)) / (n + j)``. The sum over the first `places`
    is returned for each of the r, that is, divided by r.
    """
    expected = (relevant_above + 1) / (above + 1) * (places / tied)
    several = (places > 1).nonzero(as_tuple=True)
    if len(several[0]):
        n, t = above[several], tied[several]
        m, r, stop = relevant_above[several], relevant_tied[several], places[several]
        inverse = harmonic(n + stop) - harmonic(n)  # sum of 1 / (n + j)
        more = (r - 1) / (t - 1)
        expected[several] = ((m + 1) * inverse + more * (stop - (n + 1) * inverse)) / t
    return expected


def harmonic(n: Tensor) -> Tensor:
    """Sum of 1 / i for i up to n, less Euler's constant."""
    value: Tensor = torch.special.digamma(n + 1)
    return value


def vote(search: Search, block: Block, nearest: tuple[Tensor, Tensor], k: int) -> Tensor:
    """Chance that each query's class wins the vote of its k nearest, float64 ``[b]``.

    `nearest` has the scores and columns of at least one item more. Of fewer items all vote.
    """
    scores, columns = nearest
    k = min(k, len(search.items) - int(search.own))
    last = scores[:, k - 1 : k + 1]
    classes = search.classes.new_zeros(block.scores.shape[1])  # the filling has no votes
    classes[: len(search.classes)] = search.classes
    votes = scores.new_zeros(len(scores), len(search.counts), dtype=torch.float64)
    votes.scatter_add_(1, classes[columns[:, :k]], (scores[:, :k] > NO_ITEM).double())
    # Where more compete for the last places, each has its chance of one.
    crowded = last[:, 0] == last[:, 1]
    if crowded.any():
        lowest = last[crowded, :1]
        sure, tied = block.scores[crowded] > lowest, block.scores[crowded] == lowest
        places = k - sure.sum(dim=1, keepdim=True)
        chance = places / tied.sum(dim=1, keepdim=True).double() * (lowest > NO_ITEM)
        weight = sure + tied * chance
        votes[crowded] = torch.zeros_like(votes[crowded]).scatter_add_(
            1, classes.expand(weight.shape), weight
        )
    best = votes.max(dim=1).values
    # Weights are sums of fractions: equal votes may differ in their last bits.
    winners = votes >= best[:, None] - 1e-9
    mine = winners.gather(1, search.query_classes[block.rows][:, None])[:, 0]
    return mine / winners.sum(dim=1).double()
