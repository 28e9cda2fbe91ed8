"""Hinge: a pair of different classes costs ``max(0, S - margin)``.

This has no closed form. Rows sorted by class are compared in blocks, and the gradient is
accumulated with the value, so no two blocks are in memory at once.

Four items by hand, two of either class, with a margin of 0.7:

>>> import torch
>>> z = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
>>> S = (z[:2] @ z[2:].T)
>>> S, cost(S, 0.7)
(tensor([[0.6000, 1.0000],
        [0.8000, 0.0000]]), tensor([[0.0000, 0.3000],
        [0.1000, 0.0000]]))

Of the row z_0, the one pair that costs something gives the gradient z_3, and adding up such
partners also adds up the similarities: their sum is the product with z_0.

>>> active = (S > 0.7).float()
>>> toward = active @ z[2:]
>>> toward
tensor([[1.0000, 0.0000],
        [0.6000, 0.8000]])
>>> (toward * z[:2]).sum() - 0.7 * active.sum()  # 0.3 + 0.1
tensor(0.4000)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pairclip import _vectors
from pairclip._vectors import Classes
from pairclip.losses.batch import Batch, Term


def cost(similarity: Tensor, margin: float) -> Tensor:
    """What pairs of different classes cost, each."""
    return (similarity - margin).clamp_min(0)


def over_all_pairs(batch: Batch, margin: float, weight: Tensor) -> Term:
    """Sum of ``max(0, S - margin)`` over the pairs of different classes, in ``O(B^2 D)``."""
    unit, classes = batch.unit(), batch.classes
    rows, ids = unit[classes.order], classes.ids[classes.order]
    gradient = torch.zeros_like(rows)
    total = rows.new_zeros((), dtype=torch.float64)
    for block in _row_blocks(classes, most=max(1, unit.shape[1])):
        left, right = rows[block.start : block.stop], rows[block.first :]
        similarity = left @ right.T
        if block.first == block.start:
            same = ids[block.start : block.stop, None] == ids[block.start : block.same_until]
            # Below any margin.
            similarity[:, : block.same_until - block.start].masked_fill_(same, -2)
        active = similarity.gt_(margin)
        if block.first == block.start:
            active[:, : block.stop - block.start].triu_(1)
        # The similarities of the active pairs add up row by row in their gradient.
        toward = active @ right
        total += (toward * left).sum(dim=1).double().sum()
        total -= margin * active.sum(dim=1).double().sum()
        if batch.wanted:
            gradient[block.start : block.stop] += toward
            gradient[block.first :].addmm_(active.T, left)
    if not batch.wanted:
        return Term(total)
    gradient.mul_(weight.to(unit.dtype))
    in_order = torch.empty_like(gradient).index_copy_(0, classes.order, gradient)
    return Term(total, of_rows=in_order)


class _RowBlock(NamedTuple):
    """Rows, sorted by class, to be compared with those from `first` on."""

    start: int
    stop: int
    first: int
    same_until: int  # from here on, no row is of a class of the block


def _row_blocks(classes: Classes, most: int) -> Iterator[_RowBlock]:
    """Blocks of rows sorted by class.

    Where the counts can be read without waiting for a device, blocks end where classes do, so
    that a block of one class needs no column of its own class, and others need few masks.
    """
    size = len(classes.order)
    if not _vectors.at_hand(classes.order):
        for start in range(0, size, most):
            yield _RowBlock(start, min(start + most, size), start, size)
        return
    start = end = 0
    for count in classes.counts.tolist():
        if count >= most or end + count - start > most:
            if end > start:
                yield _RowBlock(start, end, start, end)
            start = end
        end += count
        if count >= most:
            for begin in range(start, end, most):
                yield _RowBlock(begin, min(begin + most, end), end, end)
            start = end
    if end > start:
        yield _RowBlock(start, end, start, end)
