"""A loss that also keeps what the tower knew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pairclip import _checks
from pairclip._vectors import differentiable_unit_rows, unit_rows
from pairclip.losses.targets import as_targets, target_similarity_loss


class PreservingLoss(nn.Module):
    """A loss, plus the distance of the embeddings from those of the untouched tower.

    The targets are embeddings of the same images, made before the training; `Finetuner.fit` makes
    them where it is given none. An image with the label -1 counts for the preserving term alone,
    so images of no class, or of classes that are not to be trained, can be kept where they are:
    ``fit(train, keep=images)``.

    Args:
        loss: Any loss on ``(embeddings, labels)``, of which it gets the rows with a label of 0 or
            more; or on ``(embeddings, labels, targets)`` if it says so by ``takes_targets``. If it
            is a module, its parameters are trained and saved too. A batch without a label leaves
            it out.
        weight: Of the preserving term, positive.
        what: ``"embeddings"`` keeps each embedding where it was, by the mean of
            ``1 - cos(embedding, target)`` over the images. ``"similarities"`` keeps the similarity
            of each pair, by `target_similarity_loss`, and lets all embeddings turn together.

    Raises:
        ValueError: If an argument is out of range, or `loss` takes pairs.
        TypeError: If `loss` is not callable.

    Example:
        >>> import torch
        >>> from pairclip import AllPairsCosineLoss, PreservingLoss
        >>> loss = PreservingLoss(AllPairsCosineLoss(), weight=0.3, what="embeddings")
        >>> embeddings, labels = torch.eye(3), torch.tensor([0, 0, -1])
        >>> loss(embeddings, labels, targets=torch.eye(3))  # of the two labelled images
        tensor(1.)

    References:
        Li and Hoiem 2016, "Learning without forgetting"; Park et al. 2019, "Relational
        knowledge distillation".
    """

    takes_targets = True
    preserves = True

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        weight: float,
        what: Literal["embeddings", "similarities"] = "embeddings",
    ) -> None:
        super().__init__()
        if not callable(loss):
            raise TypeError(f"`loss` must be callable, got {loss!r}.")
        if getattr(loss, "takes_pairs", False):
            raise ValueError(
                f"`loss` {type(loss).__name__} takes pairs, and a PreservingLoss batches, some of "
                "whose images may have no label. Use `AllPairsCosineLoss` with a "
                "`positive_fraction`."
            )
        _checks.check_number("weight", weight)
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"`weight` must be positive, got {weight}. Without a preserving term, take `loss` "
                "itself."
            )
        _checks.check_choice("what", what, ("embeddings", "similarities"))
        self.loss = loss
        self.weight = weight
        self.what: Literal["embeddings", "similarities"] = what

    def forward(self, embeddings: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """``[B, D]``, ``[B]`` and ``[B, K]`` give a scalar; to keep embeddings, K is D."""
        labels = _checks.as_labels("labels", labels, length=len(embeddings))
        preserved = self.weight * self._distance(embeddings, targets)
        labelled = labels >= 0
        if not bool(labelled.all()):
            if not bool(labelled.any()):
                return preserved
            labelled = labelled.to(embeddings.device)
            embeddings, labels = embeddings[labelled], labels[labelled.to(labels.device)]
            targets = targets[labelled.to(targets.device)]
        takes_targets = getattr(self.loss, "takes_targets", False)
        return self.loss(embeddings, labels, *[targets] * takes_targets) + preserved

    def _distance(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        if self.what == "similarities":
            return target_similarity_loss(embeddings, targets)
        embeddings = _checks.as_embeddings("embeddings", embeddings)
        rows = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        targets = as_targets(targets, rows)
        if targets.shape != rows.shape:
            raise ValueError(
                f"`targets` must have the shape of the embeddings, {list(rows.shape)}, got "
                f"{list(targets.shape)}. Other targets can keep 'similarities'."
            )
        with torch.autocast(rows.device.type, enabled=False):
            cosine = (differentiable_unit_rows(rows) * unit_rows(targets)).sum(dim=1)
            return (1 - cosine).sum() / max(len(rows), 1)

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        of = "" if isinstance(self.loss, nn.Module) else f"loss={_name(self.loss)}, "
        return f"{of}weight={self.weight}, what={self.what!r}"


def _name(loss: object) -> str:
    return getattr(loss, "__qualname__", type(loss).__qualname__)
