"""Where the relevant items of each query stand among all, from one sort of integer keys.

By hand: a query of class A and four items, of scores .9 (A), .5 (B), .5 (A) and .1 (A). A key is
an integer that orders as the score does, times two, and one more for a relevant item. With 9, 5
and 1 for the scores the keys are 19, 10, 11 and 3, ascending::

    keys    3    10   11   19
    place   0    1    2    3

The relevant items are the odd keys, at places 0, 2 and 3: so 3, 1 and 0 items are above them, and
2, 1 and 0 relevant ones, from one look at the sorted row. The item at place 2 has the score of the
one before it. The order of the two is left to chance, so their run is counted: 1 item above it, 2
in it, 1 relevant one above it, 1 relevant one in it::

    above             3    1    0
    tied              1    2    1
    relevant_above    2    1    0
    relevant_tied     1    1    1

The expected precision at 2, for instance, is (1 + 1/2) / 2: the best item surely has a place, and
the second place goes to one of the two tied ones, one of which is relevant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairclip.retrieval.blocks import Block

# Rows sorted at once on one thread: few enough for the processor's cache.
_ROWS = 32


class Ranks(NamedTuple):
    """Where the relevant items of each query stand among all; its best one is the last.

    All are float64, so that no formula needs to convert them.
    """

    above: Tensor  # [b, r] items of a higher score; infinite in front, with fewer than r relevant
    tied: Tensor  # [b, r] items of the same score, itself included
    relevant_above: Tensor  # [b, r] relevant items of a higher score
    relevant_tied: Tensor  # [b, r] relevant items of the same score, itself included
    total: Tensor  # [b] relevant items


def rank_in_place(block: Block, total: Tensor, first: int | None = None) -> Ranks:
    """Rank the relevant items of each query, overwriting the scores of the block.

    Args:
        block: Scores between -2 and 2.
        total: Relevant items of each query, ``[b]``.
        first: Ranks are given of this many places at least; None stands for all.
    """
    ordered = _highest_keys_in_place(block, first)
    rows, width = ordered.shape
    places, tied = _relevant(ordered)
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
        relevant_above=(most - 1 - column).double().repeat(rows, 1),
        relevant_tied=torch.ones_like(above),
        total=total.double(),
    )
    if tied.any():
        _count_ties(ranks, ordered, places, tied, most - counts.cumsum(0))
    return ranks


def _highest_keys_in_place(block: Block, first: int | None) -> Tensor:
    """Keys of each query's items, ascending, of the `first` places at least.

    In front is one item more, of a lower score, which is not relevant or counts as if it were not.
    """
    parts = []
    for of_keys in _keys_in_place(block):
        _sort_in_place(of_keys, first)
        parts.append(of_keys)
    keys = as_keys(block.scores)
    columns = keys.shape[1]
    while first is not None and first < columns - 1:
        below, lowest = (keys[:, -first - step] >> 1 for step in (1, 0))
        if not (below == lowest).any():
            top = keys[:, -first - 1 :].contiguous()
            top[:, 0] &= -2
            return top
        first *= 2
        for of_keys in parts:
            _sort_in_place(of_keys, first)
    return keys


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def as_keys(scores: Tensor) -> Tensor:
    """The memory of scores, read as integers."""
    return scores.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)


def _keys_in_place(block: Block) -> Iterator[Tensor]:
    """Make keys of the scores of a block, a few rows at a time, which are then in the cache."""
    all_keys = as_keys(block.scores)
    size = _ROWS if _on_cpu(all_keys) else len(all_keys)
    for keys, members in zip(all_keys.split(size), block.members.split(size), strict=True):
        # Of numbers between -2 and 2, sign and size become an even integer of the same order.
        signs = keys >> 8 * keys.itemsize - 1
        keys <<= 1
        keys ^= signs
        keys -= signs
        mine = keys.gather(1, members)
        keys.scatter_(1, members, mine.add_(mine > keys[:, -1:]))
        yield keys


def partition_in_place(rows: Tensor, first: int) -> None:
    """Move the `first` highest of each row to its end, and the next one in front of them."""
    if _on_cpu(rows):
        # By SIMD instructions: NumPy's is about 30 times as fast as torch.
        rows.numpy().partition(rows.shape[1] - first - 1, axis=1)
    else:
        rows.copy_(rows.sort(dim=1).values)


def _sort_in_place(keys: Tensor, first: int | None) -> None:
    """Sort each row; at least the highest, one more than `first`, at its end."""
    if not _on_cpu(keys):
        keys.copy_(keys.sort(dim=1).values)
    elif first is None or first >= keys.shape[1] - 1:
        keys.numpy().sort(axis=1)
    else:
        partition_in_place(keys, first)  # a tenth of a sort
        keys[:, -first - 1 :].numpy().sort(axis=1)


def _relevant(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the flat keys of relevant items, and whether the item before has that score."""
    odd = (ordered & 1).bool().flatten()
    if _on_cpu(ordered):
        places = torch.from_numpy(np.flatnonzero(odd.numpy()))
    else:
        places = odd.nonzero()[:, 0]
    flat = ordered.flatten()
    mine, before = (flat.index_select(0, places - step) >> 1 for step in (0, 1))
    return places, mine == before


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
    for corrected, value in (
        (ranks.above, above),
        (ranks.tied, width - above - below),
        (ranks.relevant_above, ranks.relevant_above[of_run, last]),
        (ranks.relevant_tied, lengths),
    ):
        corrected[row, column] = value.double().repeat_interleave(lengths)
