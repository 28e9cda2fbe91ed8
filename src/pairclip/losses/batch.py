"""A batch as the losses over all its pairs see it, and the two parts of their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pairclip import _vectors
from pairclip._vectors import Classes, class_sums, group_by_class, row_norms

# Numbers in a piece of rows that fits a processor's cache.
_PIECE = 1 << 19


class Repulsion(NamedTuple):
    """Sum of what the pairs of different classes cost, and its weighted gradient.

    The gradient is that with respect to the unit rows, and may come in two parts that add up.
    What is parallel to a row falls away later and need not be right.
    """

    total: Tensor  # scalar, float64
    of_classes: Tensor | None = None  # [C, D] float64, the same for all rows of a class
    of_rows: Tensor | None = None  # [B, D]


class Batch:
    """Rows of a batch, at least two, sorted by class.

    Attributes:
        rows: Embeddings, float32 or float64 ``[B, D]``.
        wanted: Whether a gradient is wanted.
        nonzero: Whether a row has a direction, bool ``[B]``.
        classes: The rows by class.
        sums: Sum of the unit rows of each class slot, float64 ``[C, D]``.
        squared_sums: Squared length of each sum, float64 ``[C]``.
    """

    def __init__(self, rows: Tensor, labels: Tensor, *, wanted: bool) -> None:
        norms = row_norms(rows)
        self.rows, self.wanted = rows, wanted
        self.nonzero = norms > 0
        self._lengths = norms.where(self.nonzero, 1.0).to(rows.dtype)
        self._inverse = (1 / self._lengths).clamp_max_(torch.finfo(rows.dtype).max)
        self.classes: Classes = group_by_class(labels)
        self.sums = class_sums(rows, self.classes, self._inverse)
        self.squared_sums = self.sums.square().sum(dim=1)

    def unit(self) -> Tensor:
        """Unit rows, ``[B, D]``; a zero row stays zero."""
        return self.rows / self._lengths[:, None]

    def gradient(self, of_classes: Tensor, of_rows_destroyed: Tensor | None) -> Tensor:
        """Gradient with respect to the rows, from its two parts with respect to the unit rows."""
        rows = self.rows
        of_classes = of_classes.to(rows.dtype)
        scale = self._inverse * self.nonzero
        result = torch.empty_like(rows) if of_rows_destroyed is None else of_rows_destroyed
        size = len(rows)
        if _vectors.at_hand(rows):
            size = max(1, _PIECE // max(1, rows.shape[1]))
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            toward = of_classes[self.classes.ids[piece]]
            if of_rows_destroyed is not None:
                toward += of_rows_destroyed[piece]
            # Through the normalisation: the part orthogonal to the row, over its length.
            unit = rows[piece] / self._lengths[piece, None]
            toward.addcmul_(unit, (unit * toward).sum(dim=1, keepdim=True), value=-1)
            torch.mul(toward, scale[piece, None], out=result[piece])
        return result
