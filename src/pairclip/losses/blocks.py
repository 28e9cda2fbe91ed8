"""Pairs beyond a margin, in blocks of rows sorted by class.

The gradient is accumulated with the value, so no two blocks are in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pairclip import _vectors
from pairclip._vectors import Classes
from pairclip.losses.batch import Batch, Term


def over_pairs(batch: Batch, margin: float, weight: Tensor, *, same: bool) -> Term:
    """Sum of what the pairs of one class lack to the margin, or of what others exceed it by."""
    unit, classes = batch.unit(), batch.classes
    rows, ids = unit[classes.order], classes.ids[classes.order]
    gradient = torch.zeros_like(rows)
    total = rows.new_zeros((), dtype=torch.float64)
    # Rows of other classes in a block are columns that its own classes have no use for.
    width = max(1, unit.shape[1])
    most = min(64, width) if same and _vectors.at_hand(unit) else width
    for start, stop, first, same_until in row_blocks(classes, most):
        first, last = (start, same_until) if same else (first, len(rows))
        left, right = rows[start:stop], rows[first:last]
        similarity = left @ right.T
        if first == start:
            wrong = (ids[start:stop, None] == ids[start:same_until]) != same
            # Beyond no margin.
            similarity[:, : same_until - start].masked_fill_(wrong, 2 if same else -2)
        active = similarity.lt_(margin) if same else similarity.gt_(margin)
        if first == start:
            active[:, : stop - start].triu_(1)
        # The similarities of the active pairs add up row by row in their gradient.
        toward = active @ right
        total += (toward * left).sum(dim=1).double().sum()
        total -= margin * active.sum(dim=1).double().sum()
        if batch.wanted:
            gradient[start:stop] += toward
            gradient[first:last].addmm_(active.T, left)
    sign = -1 if same else 1
    if not batch.wanted:
        return Term(sign * total)
    gradient.mul_(sign * weight.to(unit.dtype))
    in_order = torch.empty_like(gradient).index_copy_(0, classes.order, gradient)
    return Term(sign * total, of_rows=in_order)


class RowBlock(NamedTuple):
    """Rows, sorted by class, to be compared with those of other classes from `first` on."""

    start: int
    stop: int
    first: int
    same_until: int  # from here on, no row is of a class of the block


def row_blocks(classes: Classes, most: int) -> Iterator[RowBlock]:
    """Blocks of rows sorted by class.

    Where the counts can be read without waiting for a device, blocks end where classes do, so
    that a block of one class needs no column of its own class, and others need few masks.
    """
    size = len(classes.order)
    if not _vectors.at_hand(classes.order):
        for start in range(0, size, most):
            yield RowBlock(start, min(start + most, size), start, size)
        return
    start = end = 0
    for count in classes.counts.tolist():
        if count >= most or end + count - start > most:
            if end > start:
                yield RowBlock(start, end, start, end)
            start = end
        end += count
        if count >= most:
            for begin in range(start, end, most):
                yield RowBlock(begin, min(begin + most, end), end, end)
            start = end
    if end > start:
        yield RowBlock(start, end, start, end)
