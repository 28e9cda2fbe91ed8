"""Metrics that need no ranks if nothing else is asked for: they count, and sort nothing.

They are those of the same name in `query_metrics`, of which the formulas are. Each takes a block,
which it overwrites, and the relevant items of each query, ``[b]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip.retrieval import query_metrics
from pairclip.retrieval.blocks import NO_ITEM, Block
from pairclip.retrieval.ranks import Ranks, keys_in_place, partition_in_place


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
    expected, start = [], 0
    for keys in keys_in_place(block):
        # Queries are sorted by R: few have another number of places than the one before them.
        runs = places[start : start + len(keys)].unique_consecutive(return_counts=True)
        start += len(keys)
        counts = runs[1].tolist()
        for of_run, run in zip(runs[0].tolist(), keys.split(counts), strict=True):
            expected.append(_count_within(run, min(of_run, keys.shape[1] - 1)))
    return torch.cat(expected)


def _count_within(keys: Tensor, places: int) -> Tensor:
    partition_in_place(keys, places)
    nearest = keys[:, -places:]
    count = (nearest & 1).sum(dim=1).double()
    last = nearest.amin(dim=1) >> 1
    # Items of the last place's score, of which not all have a place, share those that are left.
    shared = (last == keys[:, -places - 1] >> 1).nonzero()[:, 0]
    if len(shared):
        relevant, scores = (keys[shared] & 1).bool(), keys[shared] >> 1
        above, tied = scores > last[shared, None], scores == last[shared, None]
        share = (places - above.sum(dim=1)) / tied.sum(dim=1).double()
        count[shared] = (relevant & above).sum(dim=1) + share * (relevant & tied).sum(dim=1)
    return count
