"""Squared: a pair of different classes costs ``S^2``.

With second moments ``G_c = Z_c^T Z_c`` of the unit rows of each class, the squared similarities of
the pairs of one class sum up to ``(sum_c |G_c|^2 - sum_i |z_i|^4) / 2`` and those of all pairs to
``(|sum_c G_c|^2 - sum_i |z_i|^4) / 2``. The pairs of different classes are the difference.

Four items by hand, two of either class:

>>> import torch
>>> z = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
>>> (z[:2] @ z[2:].T).square().sum()  # 0.36 + 1 + 0.64 + 0
tensor(2.)
>>> first, second = z[:2].T @ z[:2], z[2:].T @ z[2:]
>>> first, second
(tensor([[1., 0.],
        [0., 1.]]), tensor([[1.3600, 0.4800],
        [0.4800, 0.6400]]))
>>> whole = first + second
>>> (whole.square().sum() - first.square().sum() - second.square().sum()) / 2
tensor(2.0000)

The gradient in z_i is ``2 (sum_c G_c - G_own) z_i``. A class of fewer rows than columns costs less
through the products of its rows, whose squares sum up to ``|G_c|^2`` as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip._vectors import Classes
from pairclip.losses.batch import Batch, Term, padded


def cost(similarity: Tensor, margin: float) -> Tensor:
    """What pairs of different classes cost, each."""
    return similarity.square()


def over_all_pairs(batch: Batch, margin: float, weight: Tensor) -> Term:
    """Sum of ``S^2`` over the pairs of different classes, in ``O(B D min(B, D))``."""
    unit, classes = batch.unit(), batch.classes
    size, width = unit.shape
    scale = 2 * weight.to(unit.dtype)
    if size > width:
        return _by_moments(unit, classes, scale, batch.wanted)
    similarity = unit @ unit.T
    similarity.masked_fill_(classes.ids[:, None] == classes.ids, 0)
    total = similarity.square().sum(dtype=torch.float64) / 2
    return Term(total, of_rows=similarity.mul_(scale) @ unit if batch.wanted else None)


def _by_moments(unit: Tensor, classes: Classes, scale: Tensor, wanted: bool) -> Term:
    width = unit.shape[1]
    counts, starts = classes.counts.tolist(), classes.starts.tolist()
    large = [
        classes.order[start : start + count]
        for start, count in zip(starts, counts, strict=True)
        if count >= width
    ]
    small = classes.counts < width
    rest = small[classes.ids].nonzero()[:, 0]

    moments = [unit[rows].T @ unit[rows] for rows in large]
    rest_unit = unit[rest]
    whole = (rest_unit.T @ rest_unit).double()
    for moment in moments:
        whole += moment
    total = whole.new_zeros(())
    gradient = torch.zeros_like(unit) if wanted else None
    for rows, moment in zip(large, moments, strict=True):
        others = whole - moment
        total += (moment * others).sum()
        if gradient is not None:
            gradient[rows] = unit[rows] @ (others.to(unit.dtype) * scale)
    if len(rest):
        toward = rest_unit @ whole.to(unit.dtype)
        total += (toward * rest_unit).sum(dim=1).double().sum()
        if gradient is not None:
            gradient[rest] = toward.mul_(scale)
        for rows in padded(classes, width):
            present = (rows >= 0)[:, :, None]
            members = unit[rows] * present
            similarity = members @ members.mT
            total -= similarity.square().sum(dtype=torch.float64)
            if gradient is not None:
                own = (similarity @ members).mul_(scale)
                gradient[rows[rows >= 0]] -= own[present[:, :, 0]]
    return Term(total / 2, of_rows=gradient)
