"""A batch as the losses over all its pairs see it, and the two parts of their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pairclip import _vectors
from pairclip._vectors import Classes, class_sums, group_by_class, row_norms

# Numbers in a piece of rows that fits a processor's cache.
_PIECE = 1 << 19


class Term(NamedTuple):
    """Sum of what all pairs of one kind cost, and its weighted gradient.

    The gradient is that with respect to the unit rows, and may come in two parts that add up.
    What is parallel to a row falls away later and need not be right.
    """

    total: Tensor  # scalar, float64
    of_classes: Tensor | None = None  # [C, D] float64, the same for all rows of a class
    of_rows: Tensor | None = None  # [B, D]


class UnitRows:
    """Rows of any length, their directions, and the way of a gradient back through these.

    Attributes:
        rows: Float32 or float64 ``[B, D]``.
        nonzero: Whether a row has a direction, bool ``[B]``.
    """

    def __init__(self, rows: Tensor) -> None:
        norms = row_norms(rows)
        self.rows = rows
        self.nonzero = norms > 0
        self._lengths = norms.where(self.nonzero, 1.0).to(rows.dtype)
        self._inverse = (1 / self._lengths).clamp_max_(torch.finfo(rows.dtype).max)

    def unit(self) -> Tensor:
        """Unit rows, ``[B, D]``; a zero row stays zero."""
        return self.rows / self._lengths[:, None]

    def gradient(self, toward_destroyed: Callable[[slice], Tensor], out: Tensor) -> Tensor:
        """Gradient with respect to the rows, from that with respect to the unit rows.

        Args:
            toward_destroyed: The gradient of some of the unit rows, a tensor that is no longer
                needed.
            out: Where the result goes, ``[B, D]``; may be where `toward_destroyed` comes from.
        """
        scale = self._inverse * self.nonzero
        size = len(self.rows)
        if _vectors.at_hand(self.rows):
            size = max(1, _PIECE // max(1, self.rows.shape[1]))
        for start in range(0, len(self.rows), size):
            piece = slice(start, start + size)
            toward = toward_destroyed(piece)
            # Through the normalisation: the part orthogonal to the row, over its length.
            unit = self.rows[piece] / self._lengths[piece, None]
            toward.addcmul_(unit, (unit * toward).sum(dim=1, keepdim=True), value=-1)
            torch.mul(toward, scale[piece, None], out=out[piece])
        return out


class Batch(UnitRows):
    """Rows of a batch, at least two, sorted by class.

    Attributes:
        wanted: Whether a gradient is wanted.
        classes: The rows by class.
        sums: Sum of the unit rows of each class slot, float64 ``[C, D]``.
        squared_sums: Squared length of each sum, float64 ``[C]``.
        same_pairs: How many pairs of one class there are, int64 scalar.
    """

    def __init__(self, rows: Tensor, labels: Tensor, *, wanted: bool) -> None:
        super().__init__(rows)
        self.wanted = wanted
        self.classes: Classes = group_by_class(labels)
        self.sums = class_sums(rows, self.classes, self._inverse)
        self.squared_sums = self.sums.square().sum(dim=1)
        counts = self.classes.counts
        self.same_pairs = (counts * (counts - 1)).sum() // 2

    def gradient_of_destroyed(self, terms: list[Term]) -> Tensor:
        """Gradient with respect to the rows, of the terms, which the list then no longer has."""
        of_classes = [term.of_classes for term in terms if term.of_classes is not None]
        of_rows = [term.of_rows for term in terms if term.of_rows is not None]
        terms.clear()
        table = _sum_into_first(of_classes or [torch.zeros_like(self.sums)]).to(self.rows.dtype)
        of_classes.clear()  # memory used anew: with many classes a fifth of the time
        whole = _sum_into_first(of_rows) if of_rows else None

        def toward(piece: slice) -> Tensor:
            of_piece = table[self.classes.ids[piece]]
            if whole is not None:
                of_piece += whole[piece]
            return of_piece

        return self.gradient(toward, torch.empty_like(self.rows) if whole is None else whole)


def _sum_into_first(tensors: list[Tensor]) -> Tensor:
    for other in tensors[1:]:
        tensors[0] += other
    return tensors[0]


def padded(classes: Classes, width: int) -> list[Tensor]:
    """Rows of the classes of fewer than `width`, as tables ``[classes, members]`` padded by -1.

    Classes of like size share a table, so that many small classes cost no more than few large
    ones, and a table holds at most a fourth of the batch's rows, or one class.
    """
    tables = []
    device = classes.order.device
    longest = 1
    while longest < 2 * width:
        fits = (classes.counts <= longest) & (classes.counts > longest // 2)
        members = (fits & (classes.counts < width)).nonzero()[:, 0]
        per_table = max(1, len(classes.order) // (4 * longest))
        for slots in members.split(per_table):
            if not len(slots):
                continue
            member = torch.arange(longest, device=device)
            present = member < classes.counts[slots, None]
            places = classes.starts[slots, None] + member
            rows = classes.order[places.clamp_max(len(classes.order) - 1)]
            tables.append(rows.where(present, -1))
        longest *= 2
    return tables
