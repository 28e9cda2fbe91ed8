"""What a pair of one class costs: ``1 - S``, or ``max(0, positive_margin - S)``.

The former is a sum of class sums. The latter has no closed form: the rows of each class are
compared in blocks, and the gradient is accumulated with the value.

Four items of one class by hand, with a positive margin of 0.7:

>>> import torch
>>> z = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
>>> S = z @ z.T
>>> S[0, 1:], S[1, 2:], S[2, 3:]
(tensor([0.0000, 0.6000, 1.0000]), tensor([0.8000, 0.0000]), tensor([0.6000]))
>>> batch = Batch(z, torch.zeros(4, dtype=torch.int64), wanted=True)
>>> over_all_pairs(batch, 0.7, torch.tensor(1.0)).total  # 0.7 + 0.1 + 0 + 0 + 0.7 + 0.1
tensor(1.6000, dtype=torch.float64)
>>> over_all_pairs(batch, 1.0, torch.tensor(1.0)).total  # 1 + 0.4 + 0 + 0.2 + 1 + 0.4
tensor(3.0000, dtype=torch.float64)

The gradient in z_i is less the sum of the rows that it is still too far from: z_0 from z_1 and z_2.

>>> over_all_pairs(batch, 0.7, torch.tensor(1.0)).of_rows[0]
tensor([-0.6000, -1.8000])
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip import _vectors
from pairclip.losses.batch import Batch, Term, padded


def cost(similarity: Tensor, positive_margin: float) -> Tensor:
    """What pairs of one class cost, each."""
    if positive_margin == 1:
        return 1 - similarity
    return (positive_margin - similarity).clamp_min(0)


def over_all_pairs(batch: Batch, positive_margin: float, weight: Tensor) -> Term:
    """Sum over the pairs of one class: in ``O(B D)`` for 1, else of all their similarities."""
    if positive_margin == 1:
        return _of_sums(batch, weight)
    unit, gradient = batch.unit(), torch.zeros_like(batch.rows)
    if _vectors.at_hand(batch.rows):
        total = _by_class(batch, unit, positive_margin, gradient)
    else:
        total = _among_all(batch, unit, positive_margin, gradient)
    if not batch.wanted:
        return Term(total)
    return Term(total, of_rows=gradient.mul_(-weight.to(unit.dtype)))


def _of_sums(batch: Batch, weight: Tensor) -> Term:
    counts = batch.classes.counts
    # Unit rows are so up to rounding: a class of one would add its rounding, and has no pair.
    squared_rows = torch.zeros_like(batch.squared_sums).index_add_(
        0, batch.classes.ids, batch.nonzero.double()
    )
    similarity = ((batch.squared_sums - squared_rows) * (counts > 1)).sum() / 2
    total = (counts * (counts - 1)).sum() // 2 - similarity
    return Term(total, of_classes=-weight * batch.sums if batch.wanted else None)


def _by_class(batch: Batch, unit: Tensor, margin: float, gradient: Tensor) -> Tensor:
    """Sum of the costs, class by class; the gradient is added up in `gradient`."""
    classes, width = batch.classes, max(1, unit.shape[1])
    total = unit.new_zeros((), dtype=torch.float64)
    counts, starts = classes.counts.tolist(), classes.starts.tolist()
    for start, count in zip(starts, counts, strict=True):
        if count < width:
            continue
        members = classes.order[start : start + count]
        rows, of_rows = unit[members], torch.zeros_like(unit[members])
        for first in range(0, count, width):
            left, right = rows[first : first + width], rows[first:]
            too_far = (margin - left @ right.T).clamp_min_(0)
            too_far[:, : len(left)].triu_(1)
            total += too_far.sum(dtype=torch.float64)
            if batch.wanted:
                active = too_far.sign_()
                of_rows[first : first + width] += active @ right
                of_rows[first:].addmm_(active.T, left)
        gradient[members] = of_rows
    for table in padded(classes, width):
        present = table >= 0
        rows = unit[table]
        too_far = (margin - rows @ rows.mT).clamp_min_(0)
        too_far.masked_fill_(~(present[:, :, None] & present[:, None]), 0)
        too_far.diagonal(dim1=1, dim2=2).fill_(0)
        total += too_far.sum(dtype=torch.float64) / 2
        if batch.wanted:
            gradient[table[present]] = (too_far.sign_() @ rows)[present]
    return total


def _among_all(batch: Batch, unit: Tensor, margin: float, gradient: Tensor) -> Tensor:
    """The same without reading how large the classes are, which would wait for the device."""
    ids, size = batch.classes.ids, max(1, unit.shape[1])
    total = unit.new_zeros((), dtype=torch.float64)
    for start in range(0, len(unit), size):
        left, right = unit[start : start + size], unit[start:]
        too_far = (margin - left @ right.T).clamp_min_(0)
        too_far.masked_fill_(ids[start : start + size, None] != ids[start:], 0)
        too_far[:, : len(left)].triu_(1)
        total += too_far.sum(dtype=torch.float64)
        if batch.wanted:
            active = too_far.sign_()
            gradient[start : start + size] += active @ right
            gradient[start:].addmm_(active.T, left)
    return total
