"""Value and gradient of the loss over all pairs of a batch, without the pairs.

The pairs of one class cost the same in any form (`attraction`). What the pairs of different classes
cost, each form says for itself (`forms`). Differences are taken in float64: one class of
two among thousands of single items leaves nothing of them in float32.

Four items by hand, two of either class:

>>> import torch
>>> z = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0]])
>>> torch.stack([z[0] @ z[1], z[2] @ z[3]])  # so the two pairs of one class cost 1 + 0.4
tensor([0.0000, 0.6000])
>>> sums = torch.stack([z[:2].sum(0), z[2:].sum(0)])
>>> 2 - (sums.square().sum() - 4) / 2  # pairs less (sum_c |s_c|^2 - sum_i |z_i|^2) / 2
tensor(1.4000)
>>> labels = torch.tensor([0, 0, 1, 1])
>>> value_and_gradient(z, labels, "linear", 0.0, 1.0, 1.0, wanted=False)[0]  # their mean
tensor(0.7000)
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairclip.losses import attraction
from pairclip.losses.batch import Batch
from pairclip.losses.forms import FORMS


def value_and_gradient(
    rows: Tensor,
    labels: Tensor,
    negatives: str,
    margin: float,
    positive_margin: float,
    positive_fraction: float | None,
    *,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of `all_pairs_cosine_loss`, and its gradient with respect to the rows if wanted."""
    if len(rows) < 2:
        return rows.new_zeros(()), torch.zeros_like(rows) if wanted else None
    batch = Batch(rows, labels, wanted=wanted)
    all_pairs = len(rows) * (len(rows) - 1) // 2
    if positive_fraction is None:
        same_weight = different_weight = torch.full_like(batch.squared_sums[0], 1 / all_pairs)
    else:
        same_weight = _weight(positive_fraction, batch.same_pairs)
        different_weight = _weight(1 - positive_fraction, all_pairs - batch.same_pairs)

    terms = [
        attraction.over_all_pairs(batch, positive_margin, same_weight),
        FORMS[negatives].over_all_pairs(batch, margin, different_weight),
    ]
    value = same_weight * terms[0].total + different_weight * terms[1].total
    value = value.to(rows.dtype)
    return value, batch.gradient_of_destroyed(terms) if wanted else None


def _weight(fraction: float, pairs: Tensor) -> Tensor:
    return torch.where(pairs > 0, fraction / pairs.clamp_min(1).double(), 0.0)
