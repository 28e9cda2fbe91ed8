"""Metrics that need no ranks if nothing else is asked for: they count, and sort nothing.

They are those of the same name in `query_metrics`, of which the formulas are. Each takes a block,
which it overwrites, and the relevant items of each query, ``[b]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip.retrieval import query_metrics
from pairclip.retrieval.blocks import NO_ITEM, Block
from pairclip.retrieval.ranks import Ranks, as_keys, partition_in_place


def hit(block: Block, total: Tensor, k: int) -> Tensor:
    """Chance that one of the k nearest is relevant, float64 ``[b]``."""
    scores = block.scores
    mine = scores.gather(1, block.members)
    best = mine.amax(dim=1, keepdim=True)
    relevant_tied = (mine == best).sum(dim=1, keepdim=True)
    scores.scatter_(1, block.members, NO_ITEM)
    highest = scores.amax(dim=1, keepdim=True)
    above, tied = (highest > best).long(), relevant_tied.clone()
    # If there is one place, it doesn't matter how many are above.
    counted = (highest == best if k == 1 else highest >= best).nonzero()[:, 0]
    others, limit = scores[counted], best[counted]
    above[counted] = (others > limit).sum(dim=1, keepdim=True)
    tied[counted] += (others == limit).sum(dim=1, keepdim=True)
    ranks = Ranks(
        above=above.double(),
        tied=tied.double(),
        relevant_above=torch.zeros_like(above, dtype=torch.float64),
        relevant_tied=relevant_tied.double(),
        total=total.double(),
    )
    return query_metrics.hit(ranks, float(k))


def precision(block: Block, total: Tensor, k: int) -> Tensor:
    """Expected share of relevant items among the k nearest, float64 ``[b]``."""
    places = min(k, block.scores.shape[1])
    return _expected_within(block, torch.full_like(total, places)) / float(k)


def r_precision(block: Block, total: Tensor) -> Tensor:
    """Expected share of relevant items among the R nearest, R being all that there are."""
    return _expected_within(block, total) / total


def _expected_within(block: Block, places: Tensor) -> Tensor:
    """Expected number of relevant items in the first places."""
    mine = block.scores.gather(1, block.members)
    # Queries are sorted by R: few have another number of places than the one before them.
    runs, lengths = places.unique_consecutive(return_counts=True)
    counts = lengths.tolist()
    parts = zip(runs.tolist(), block.scores.split(counts), mine.split(counts), strict=True)
    return torch.cat([_count_within(*part) for part in parts])


def _count_within(places: int, scores: Tensor, mine: Tensor) -> Tensor:
    places = min(places, scores.shape[1] - 1)
    # The bits of positive numbers order as they do, and NumPy partitions integers twice as fast.
    partition_in_place(as_keys(scores), places)
    last = scores[:, -places:].amin(dim=1)
    if not (last > 0).all():
        partition_in_place(scores, places)
        last = scores[:, -places:].amin(dim=1)
    count = (mine >= last[:, None]).sum(dim=1).double()
    # Items of the last place's score, of which not all have a place, share those that are left.
    shared = (last == scores[:, -places - 1]).nonzero()[:, 0]
    if len(shared):
        mine, scores, limit = mine[shared], scores[shared], last[shared, None]
        above = (scores > limit).sum(dim=1)
        share = (places - above) / (scores == limit).sum(dim=1).double()
        tied = ((mine == limit) & (mine > NO_ITEM)).sum(dim=1)
        count[shared] = (mine > limit).sum(dim=1) + share * tied
    return count
