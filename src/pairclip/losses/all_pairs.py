"""The loss over all pairs of a batch ``(embeddings, labels)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip.losses.all_pairs_gradient import value_and_gradient
from pairclip.losses.first_order import with_gradient
from pairclip.losses.forms import Negatives, check_form, described

_SECOND_ORDER = (
    "`all_pairs_cosine_loss` has no second derivatives. Use `cosine_pair_loss` on pairs of the "
    "batch, which has."
)


def all_pairs_cosine_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    negatives: Negatives = "linear",
    margin: float = 0.0,
    positive_margin: float = 1.0,
    positive_fraction: float | None = None,
) -> Tensor:
    """The pair loss over all ``B (B - 1) / 2`` pairs of a batch, without listing the pairs.

    Linear costs ``O(B D)`` time and memory, through the sum of each class. Squared costs at most
    ``O(B D^2)``, through second moments, or less through products of rows where those are fewer.
    Hinge looks at every pair of different classes, in blocks of rows, and a `positive_margin` other
    than 1 at every pair of one class. On a GPU, linear and hinge
    don't synchronise with the host. The gradient is computed in the forward pass; second
    derivatives are not supported.

    Args:
        embeddings: Shape ``[B, D]``, floating point, of any length from 1e-37 to 1e38 (float64:
            1e-150 to 1e150). A zero row has similarity 0 with everything and gradient 0. Half
            precision is computed in float32.
        labels: Class of each row, shape ``[B]``, integer.
        negatives: Cost of a pair of different classes, as in `cosine_pair_loss`.
        margin: Similarity below which a pair of different classes costs nothing, in
            ``[-1, 1)``; for ``"hinge"`` only.
        positive_margin: Similarity from which on a pair of one class costs nothing, in ``(-1, 1]``.
        positive_fraction: None for the plain mean over all pairs; ``f`` in ``[0, 1]`` for
            ``f * mean(same) + (1 - f) * mean(different)``, the expectation of `CosinePairLoss`
            on random pairs of which that fraction match. A kind of pair that the batch does not
            have counts 0.

    Returns:
        A scalar; float32, or float64 for float64 embeddings. A batch without pairs gives 0.

    Raises:
        ValueError: If an argument is out of range, would be ignored, or shapes differ.
        TypeError: If embeddings are not floating point or labels not integers.
        RuntimeError: When differentiated twice.

    Example:
        >>> import torch
        >>> from pairclip import all_pairs_cosine_loss
        >>> embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> all_pairs_cosine_loss(embeddings, torch.tensor([0, 1, 1]), positive_fraction=0.5)
        tensor(0.7500)

    References:
        Zhang et al. 2017, "Learning spread-out local feature descriptors" (second moment of
        non-matching pairs); Ranasinghe et al. 2021, "Orthogonal projection loss".
    """
    check_form(negatives, margin, positive_margin)
    if positive_fraction is not None:
        _checks.check_in("[0, 1]", "positive_fraction", positive_fraction)
    embeddings = _checks.as_embeddings("embeddings", embeddings)
    labels = _checks.as_labels("labels", labels, length=len(embeddings))
    rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    labels = labels.to(rows.device)

    def compute(rows: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        margins = float(margin), float(positive_margin)
        return value_and_gradient(
            rows, labels, negatives, *margins, positive_fraction, wanted=wanted
        )

    with torch.autocast(rows.device.type, enabled=False):
        return with_gradient(rows, compute, _SECOND_ORDER)


class AllPairsCosineLoss(nn.Module):
    """`all_pairs_cosine_loss` with its settings: a loss on ``(embeddings, labels)``.

    Args:
        negatives: ``"linear"`` (``S``, the default), ``"hinge"`` or ``"squared"``.
        margin: For ``"hinge"``, in ``[-1, 1)``.
        positive_margin: Similarity that is enough for a pair of one class, in ``(-1, 1]``.
        positive_fraction: Weight of the pairs of one class, in ``[0, 1]``; None weighs all
            pairs alike.

    Raises:
        ValueError: If an argument is out of range or would be ignored.

    Example:
        >>> import torch
        >>> from pairclip import AllPairsCosineLoss
        >>> loss = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)
        >>> loss(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        tensor(0.5000)
    """

    def __init__(
        self,
        *,
        negatives: Negatives = "linear",
        margin: float = 0.0,
        positive_margin: float = 1.0,
        positive_fraction: float | None = None,
    ) -> None:
        super().__init__()
        check_form(negatives, margin, positive_margin)
        if positive_fraction is not None:
            _checks.check_in("[0, 1]", "positive_fraction", positive_fraction)
        self.negatives: Negatives = negatives
        self.margin = margin
        self.positive_margin = positive_margin
        self.positive_fraction = positive_fraction

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See `all_pairs_cosine_loss`: ``[B, D]`` and ``[B]`` give a scalar."""
        return all_pairs_cosine_loss(
            embeddings,
            labels,
            negatives=self.negatives,
            margin=self.margin,
            positive_margin=self.positive_margin,
            positive_fraction=self.positive_fraction,
        )

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{described(self)}, positive_fraction={self.positive_fraction}"
