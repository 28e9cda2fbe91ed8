"""Linear: a pair of different classes costs its similarity ``S``.

With unit rows z_i and class sums s_c, the similarities of the pairs of one class sum up to
``(sum_c |s_c|^2 - sum_i |z_i|^2) / 2`` and those of all pairs to
``(|sum_c s_c|^2 - sum_i |z_i|^2) / 2``. The pairs of different classes are the difference.

Four items by hand, two of either class:

>>> import torch
>>> z = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
>>> S = z @ z.T
>>> S[0, 2] + S[0, 3] + S[1, 2] + S[1, 3]  # 0.6 + 1 + 0.8 + 0
tensor(2.4000)
>>> sums = torch.stack([z[:2].sum(0), z[2:].sum(0)])
>>> sums, sums.sum(0)  # their squared lengths: 2 and 3.2, and 10
(tensor([[1.0000, 1.0000],
        [1.6000, 0.8000]]), tensor([2.6000, 1.8000]))
>>> (10 - 2 - 3.2) / 2
2.4

The gradient in z_i is the sum of the rows of other classes, ``sum_c s_c`` less its own.
"""

from __future__ import annotations

from torch import Tensor

from pairclip.losses.batch import Batch, Term


def cost(similarity: Tensor, margin: float) -> Tensor:
    """What pairs of different classes cost, each."""
    return similarity


def over_all_pairs(batch: Batch, margin: float, weight: Tensor) -> Term:
    """Sum of ``S`` over the pairs of different classes, in ``O(B D)``."""
    total = batch.sums.sum(dim=0)
    return Term(
        (total.square().sum() - batch.squared_sums.sum()) / 2,
        of_classes=(total - batch.sums).mul_(weight) if batch.wanted else None,
    )
