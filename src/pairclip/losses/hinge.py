"""Hinge: a pair of different classes costs ``max(0, S - margin)``.

This has no closed form: pairs are looked at in blocks of rows (`blocks`).

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

from torch import Tensor

from pairclip.losses.batch import Batch, Term
from pairclip.losses.blocks import over_pairs


def cost(similarity: Tensor, margin: float) -> Tensor:
    """What pairs of different classes cost, each."""
    return (similarity - margin).clamp_min(0)


def over_all_pairs(batch: Batch, margin: float, weight: Tensor) -> Term:
    """Sum of ``max(0, S - margin)`` over the pairs of different classes, in ``O(B^2 D)``."""
    return over_pairs(batch, margin, weight, same=False)
