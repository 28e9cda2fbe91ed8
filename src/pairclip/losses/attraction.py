"""What a pair of one class costs: ``1 - S``, or ``max(0, positive_margin - S)``.

The former is a sum of class sums. The latter has no closed form: pairs are looked at in blocks of
rows (`blocks`).

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

from pairclip.losses.batch import Batch, Term
from pairclip.losses.blocks import over_pairs


def cost(similarity: Tensor, positive_margin: float) -> Tensor:
    """What pairs of one class cost, each."""
    if positive_margin == 1:
        return 1 - similarity
    return (positive_margin - similarity).clamp_min(0)


def over_all_pairs(batch: Batch, positive_margin: float, weight: Tensor) -> Term:
    """Sum over the pairs of one class: in ``O(B D)`` for 1, else of all their similarities."""
    if positive_margin != 1:
        return over_pairs(batch, positive_margin, weight, same=True)
    # Unit rows are so up to rounding: a class of one would add its rounding, and has no pair.
    squared_rows = torch.zeros_like(batch.squared_sums).index_add_(
        0, batch.classes.ids, batch.nonzero.double()
    )
    similarity = ((batch.squared_sums - squared_rows) * (batch.classes.counts > 1)).sum()
    total = batch.same_pairs - similarity / 2
    return Term(total, of_classes=-weight * batch.sums if batch.wanted else None)
