"""The loss on given pairs ``(a, b, same)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip._vectors import differentiable_unit_rows
from pairclip.losses import attraction
from pairclip.losses.forms import FORMS, Negatives, check_form, described

Reduction = Literal["mean", "sum", "none"]


def cosine_pair_loss(
    a: Tensor,
    b: Tensor,
    same: Tensor,
    *,
    negatives: Negatives = "linear",
    margin: float = 0.0,
    positive_margin: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Pull pairs of one class together and push pairs of different classes apart.

    With the cosine similarity ``S`` of a pair, a pair of one class costs ``1 - S``, or in general
    ``max(0, positive_margin - S)``, and a pair of different classes, by `negatives`:

    - ``"linear"``: ``S``, so the loss is ``(1 - same) * S + same * (1 - S)``;
    - ``"hinge"``: ``max(0, S - margin)``;
    - ``"squared"``: ``S ** 2``.

    Args:
        a: One embedding per pair, shape ``[B, D]``, floating point, of any length from 1e-37
            to 1e38 (float64: 1e-150 to 1e150). A zero row has similarity 0 with everything and
            gradient 0. Half precision is computed in float32.
        b: The other embedding of each pair, like `a`.
        same: Whether the two are of one class, shape ``[B]``, bool or 0 and 1. Bool costs
            no check of its values.
        negatives: Cost of a pair of different classes.
        margin: Similarity below which a pair of different classes costs nothing, in
            ``[-1, 1)``; for ``"hinge"`` only.
        positive_margin: Similarity from which on a pair of one class costs nothing, in ``(-1, 1]``.
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
    check_form(negatives, margin, positive_margin)
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
        different = FORMS[negatives].cost(similarity, margin)
        cost = torch.where(matching, attraction.cost(similarity, positive_margin), different)
        if reduction == "none":
            return cost
        total = cost.sum()
        return total if reduction == "sum" else total / max(len(a), 1)


class CosinePairLoss(nn.Module):
    """`cosine_pair_loss` with its settings: a loss on pairs ``(a, b, same)``.

    Args:
        negatives: ``"linear"`` (``S``, the default), ``"hinge"`` or ``"squared"``.
        margin: For ``"hinge"``, in ``[-1, 1)``.
        positive_margin: Similarity that is enough for a pair of one class, in ``(-1, 1]``.
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

    takes_pairs = True

    def __init__(
        self,
        *,
        negatives: Negatives = "linear",
        margin: float = 0.0,
        positive_margin: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_form(negatives, margin, positive_margin)
        _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.negatives: Negatives = negatives
        self.margin = margin
        self.positive_margin = positive_margin
        self.reduction: Reduction = reduction

    def forward(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        """See `cosine_pair_loss`: ``[B, D]``, ``[B, D]`` and ``[B]`` give the loss."""
        return cosine_pair_loss(
            a,
            b,
            same,
            negatives=self.negatives,
            margin=self.margin,
            positive_margin=self.positive_margin,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{described(self)}, reduction={self.reduction!r}"


def on_pairs(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> nn.Module:
    """Say of a loss that it takes pairs, so that a `Finetuner` gives it those of a `PairSampler`.

    A loss which has the attribute ``takes_pairs = True``, as `CosinePairLoss` has, needs no
    `on_pairs`.

    Args:
        loss: Any callable ``loss(a, b, same)`` of embeddings ``[B, D]``, their partners ``[B, D]``
            and whether the two are of one class, ``[B]`` bool, that returns a scalar. If it is a
            module, its parameters are trained and saved too.

    Returns:
        A module that is called like `loss`.

    Raises:
        TypeError: If `loss` is not callable.

    Example:
        >>> import torch
        >>> from pairclip import on_pairs
        >>> loss = on_pairs(lambda a, b, same: ((a - b).norm(dim=1) - 1 + same.int()).abs().mean())
        >>> loss(torch.eye(2), torch.eye(2), torch.tensor([True, True])).item()
        0.0
    """
    if not callable(loss):
        raise TypeError(f"`loss` must be callable as loss(a, b, same), got {loss!r}.")
    return _OnPairs(loss)


class _OnPairs(nn.Module):
    takes_pairs = True

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        return self.loss(a, b, same)

    def extra_repr(self) -> str:
        return "" if isinstance(self.loss, nn.Module) else getattr(self.loss, "__name__", "")


def _as_bool(same: Tensor, length: int) -> Tensor:
    if not isinstance(same, Tensor):
        same = torch.as_tensor(same, device="cpu")
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
