"""Losses on the cosine similarity of pairs of embeddings."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip._all_pairs import AllPairs
from pairclip._vectors import differentiable_unit_rows

Negatives = Literal["linear", "hinge", "squared"]
Reduction = Literal["mean", "sum", "none"]


def cosine_pair_loss(
    a: Tensor,
    b: Tensor,
    same: Tensor,
    *,
    negatives: Negatives = "linear",
    margin: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Pull pairs of one class together and push pairs of different classes apart.

    With the cosine similarity ``S`` of a pair, a pair of one class costs ``1 - S`` and a pair of
    different classes, by `negatives`:

    - ``"linear"``: ``S``, so the loss is ``(1 - same) * S + same * (1 - S)``;
    - ``"hinge"``: ``max(0, S - margin)``;
    - ``"squared"``: ``S ** 2``.

    Args:
        a: One embedding per pair, shape ``[B, D]``, floating point, any length. A zero row has
            similarity 0 with everything and gradient 0. Half precision is computed in float32.
        b: The other embedding of each pair, like `a`.
        same: Whether the two are of one class, shape ``[B]``, bool or 0 and 1. Bool costs
            no check of its values.
        negatives: Cost of a pair of different classes.
        margin: Similarity below which a pair of different classes costs nothing, in
            ``[-1, 1)``; for ``"hinge"`` only.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean of no pairs is 0.

    Returns:
        A scalar, or shape ``[B]`` for ``"none"``; float32, or float64 for float64 embeddings.

    Raises:
        ValueError: If an argument is out of range, would be ignored, or shapes differ.
        TypeError: If embeddings are not floating point.

    Example:
        >>> import torch
        >>> from pairclip import cosine_pair_loss
        >>> a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> b = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
        >>> cosine_pair_loss(a, b, torch.tensor([True, False]), reduction="none")
        tensor([0.0000, 0.6000])

    References:
        Hadsell, Chopra and LeCun 2006, "Dimensionality reduction by learning an invariant
        mapping" (contrastive loss); `torch.nn.CosineEmbeddingLoss` (the hinge on cosines).
    """
    _check_form(negatives, margin)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    a, b = _checks.as_embeddings("a", a), _checks.as_embeddings("b", b)
    if a.shape != b.shape:
        raise ValueError(
            f"`a` and `b` must have the same shape, got {list(a.shape)} and {list(b.shape)}. "
            "Row i of both is pair i."
        )
    matching = _as_bool(same, len(a)).to(a.device)
    with torch.autocast(a.device.type, enabled=False):
        a, b = (rows if rows.dtype == torch.float64 else rows.float() for rows in (a, b))
        similarity = (differentiable_unit_rows(a) * differentiable_unit_rows(b)).sum(dim=1)
        if negatives == "linear":
            different = similarity
        elif negatives == "hinge":
            different = (similarity - margin).clamp_min(0)
        else:
            different = similarity.square()
        cost = torch.where(matching, 1 - similarity, different)
        if reduction == "none":
            return cost
        total = cost.sum()
        return total if reduction == "sum" else total / max(len(a), 1)


def all_pairs_cosine_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    negatives: Negatives = "linear",
    margin: float = 0.0,
    positive_fraction: float | None = None,
) -> Tensor:
    """The pair loss over all ``B (B - 1) / 2`` pairs of a batch, without listing the pairs.

    Linear costs ``O(B D)`` time and memory, through the sum of each class. Squared costs at most
    ``O(B D^2)``, through second moments, or less through products of rows where those are fewer.
    Hinge looks at every pair of different classes, in blocks of rows. On a GPU, linear and hinge
    don't synchronise with the host. The gradient is computed in the forward pass; second
    derivatives are not supported.

    Args:
        embeddings: Shape ``[B, D]``, floating point, any length. A zero row has similarity 0
            with everything and gradient 0. Half precision is computed in float32.
        labels: Class of each row, shape ``[B]``, integer.
        negatives: Cost of a pair of different classes, as in `cosine_pair_loss`.
        margin: Similarity below which a pair of different classes costs nothing, in
            ``[-1, 1)``; for ``"hinge"`` only.
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
    _check_form(negatives, margin)
    if positive_fraction is not None:
        _checks.check_fraction("positive_fraction", positive_fraction)
    embeddings = _checks.as_embeddings("embeddings", embeddings)
    labels = _checks.as_labels("labels", labels, length=len(embeddings))
    rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    with torch.autocast(rows.device.type, enabled=False):
        loss: Tensor = AllPairs.apply(
            rows, labels.to(rows.device), negatives, float(margin), positive_fraction
        )
    return loss


class CosinePairLoss(nn.Module):
    """`cosine_pair_loss` with its settings: a loss on pairs ``(a, b, same)``.

    Args:
        negatives: ``"linear"`` (``S``, the default), ``"hinge"`` or ``"squared"``.
        margin: For ``"hinge"``, in ``[-1, 1)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If an argument is out of range or would be ignored.

    Example:
        >>> import torch
        >>> from pairclip import CosinePairLoss
        >>> loss = CosinePairLoss(negatives="hinge", margin=0.25)
        >>> loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([True, False]))
        tensor(0.3750)
    """

    def __init__(
        self,
        *,
        negatives: Negatives = "linear",
        margin: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_form(negatives, margin)
        _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.negatives: Negatives = negatives
        self.margin = margin
        self.reduction: Reduction = reduction

    def forward(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        """See `cosine_pair_loss`: ``[B, D]``, ``[B, D]`` and ``[B]`` give the loss."""
        return cosine_pair_loss(
            a,
            b,
            same,
            negatives=self.negatives,
            margin=self.margin,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"negatives={self.negatives!r}, margin={self.margin}, reduction={self.reduction!r}"


class AllPairsCosineLoss(nn.Module):
    """`all_pairs_cosine_loss` with its settings: a loss on ``(embeddings, labels)``.

    Args:
        negatives: ``"linear"`` (``S``, the default), ``"hinge"`` or ``"squared"``.
        margin: For ``"hinge"``, in ``[-1, 1)``.
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
        positive_fraction: float | None = None,
    ) -> None:
        super().__init__()
        _check_form(negatives, margin)
        if positive_fraction is not None:
            _checks.check_fraction("positive_fraction", positive_fraction)
        self.negatives: Negatives = negatives
        self.margin = margin
        self.positive_fraction = positive_fraction

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See `all_pairs_cosine_loss`: ``[B, D]`` and ``[B]`` give a scalar."""
        return all_pairs_cosine_loss(
            embeddings,
            labels,
            negatives=self.negatives,
            margin=self.margin,
            positive_fraction=self.positive_fraction,
        )

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return (
            f"negatives={self.negatives!r}, margin={self.margin}, "
            f"positive_fraction={self.positive_fraction}"
        )


def _check_form(negatives: str, margin: float) -> None:
    _checks.check_choice("negatives", negatives, ("linear", "hinge", "squared"))
    _checks.check_number("margin", margin)
    if negatives != "hinge":
        if margin != 0:
            raise ValueError(
                f"`margin` {margin} would be ignored: only negatives='hinge' has a margin, and "
                f"`negatives` is {negatives!r}."
            )
    elif not (math.isfinite(margin) and -1 <= margin < 1):
        raise ValueError(
            f"`margin` must be in [-1, 1), got {margin}. A margin of 1 never penalises a pair."
        )


def _as_bool(same: Tensor, length: int) -> Tensor:
    if not isinstance(same, Tensor):
        same = torch.as_tensor(same)
    if same.shape != (length,):
        raise ValueError(
            f"`same` must have one value per pair, shape [{length}], got {list(same.shape)}."
        )
    if same.dtype == torch.bool:
        return same
    matching = same == 1
    if not bool((matching | (same == 0)).all()):
        wrong = same[~(matching | (same == 0))][0].item()
        raise ValueError(
            f"`same` must be bool or 0 and 1, got {wrong}. Use `labels_a == labels_b`."
        )
    return matching
