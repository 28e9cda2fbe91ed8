"""Value and gradient of the pair losses over all pairs of a batch, without the pairs.

With unit rows z_i and class sums s_c, the sum of the similarities of same-class pairs is
``(sum_c |s_c|^2 - sum_i |z_i|^2) / 2``; with second moments ``G_c = Z_c^T Z_c`` the sum of the
squared ones is ``(sum_c |G_c|_F^2 - sum_i |z_i|^4) / 2``. All pairs follow likewise, and the pairs
of different classes by difference. Those differences are taken in float64: one class of two
among thousands of single items leaves nothing of them in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pairclip import _vectors
from pairclip._vectors import Classes, class_sums, group_by_class, row_norms

# Numbers in a piece of rows that fits a processor's cache.
_PIECE = 1 << 19


class AllPairs(torch.autograd.Function):
    """The loss of `all_pairs_cosine_loss`, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        labels: Tensor,
        negatives: str,
        margin: float,
        positive_fraction: float | None,
    ) -> Tensor:
        """Value of the loss; its gradient is kept for `backward`."""
        wanted = ctx.needs_input_grad[0]
        if len(rows) < 2:
            ctx.save_for_backward(torch.zeros_like(rows), rows)
            return rows.new_zeros(())
        value, gradient = _value_and_gradient(
            rows, labels, negatives, margin, positive_fraction, wanted
        )
        if gradient is not None:
            ctx.save_for_backward(gradient, rows)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The kept gradient, scaled."""
        gradient, rows = ctx.saved_tensors
        # The usual factor of 1 is not worth a copy where looking at it costs no waiting.
        if not (_vectors.at_hand(rows) and grad_outputs[0] == 1):
            gradient = gradient * grad_outputs[0]
        return _FirstOrder.apply(gradient, rows), None, None, None, None


class _FirstOrder(torch.autograd.Function):
    """Identity that can't be differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, rows: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> Tensor:
        raise RuntimeError(
            "`all_pairs_cosine_loss` has no second derivatives. Use `cosine_pair_loss` on pairs "
            "of the batch, which has."
        )


def _value_and_gradient(
    rows: Tensor,
    labels: Tensor,
    negatives: str,
    margin: float,
    positive_fraction: float | None,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    norms = row_norms(rows)
    nonzero = norms > 0
    lengths = norms.where(nonzero, 1.0).to(rows.dtype)
    classes = group_by_class(labels)
    inverse = (1 / lengths).clamp_max_(torch.finfo(rows.dtype).max)
    sums = class_sums(rows, classes, inverse)

    counts = classes.counts
    same_pairs = (counts * (counts - 1)).sum() // 2
    all_pairs = len(rows) * (len(rows) - 1) // 2
    different_pairs = all_pairs - same_pairs
    if positive_fraction is None:
        same_weight = different_weight = torch.full_like(norms[0], 1 / all_pairs)
    else:
        same_weight = _weight(positive_fraction, same_pairs)
        different_weight = _weight(1 - positive_fraction, different_pairs)

    squared_sums = sums.square().sum(dim=1)
    # Unit rows are so up to rounding: a class of one would add its rounding, and has no pair.
    squared_rows = torch.zeros_like(squared_sums).index_add_(0, classes.ids, nonzero.double())
    same_similarity = ((squared_sums - squared_rows) * (counts > 1)).sum() / 2
    value = same_weight * (same_pairs - same_similarity)
    # Gradients with respect to the unit rows; what is parallel to a row falls away below.
    table = -same_weight * sums
    gradient: Tensor | None = None
    if negatives == "linear":
        total = sums.sum(dim=0)
        value = value + different_weight * (total.square().sum() - squared_sums.sum()) / 2
        table += different_weight * (total - sums)
    else:
        unit = rows / lengths[:, None]
        if negatives == "squared":
            different, gradient = _squared(unit, classes, different_weight, wanted)
        else:
            different, gradient = _hinge(unit, classes, margin, different_weight, wanted)
        value = value + different_weight * different
    value = value.to(rows.dtype)
    if not wanted:
        return value, None
    table = table.to(rows.dtype)
    scale = inverse * nonzero
    result = torch.empty_like(rows) if gradient is None else gradient
    on_cpu = _vectors.at_hand(rows)
    size = max(1, _PIECE // max(1, rows.shape[1])) if on_cpu else len(rows)
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        toward = table[classes.ids[piece]]
        if gradient is not None:
            toward += gradient[piece]
        # Through the normalisation: the part orthogonal to the row, over its length.
        unit = rows[piece] / lengths[piece, None]
        toward.addcmul_(unit, (unit * toward).sum(dim=1, keepdim=True), value=-1)
        torch.mul(toward, scale[piece, None], out=result[piece])
    return value, result


def _weight(fraction: float, pairs: Tensor) -> Tensor:
    return torch.where(pairs > 0, fraction / pairs.clamp_min(1).double(), 0.0)


def _hinge(
    unit: Tensor, classes: Classes, margin: float, weight: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of ``max(0, S - margin)`` over pairs of different classes; weighted gradient."""
    rows, ids = unit[classes.order], classes.ids[classes.order]
    gradient = torch.zeros_like(rows)
    total = rows.new_zeros((), dtype=torch.float64)
    for start, stop, first, same_until in _row_blocks(classes, most=max(1, unit.shape[1])):
        left, right = rows[start:stop], rows[first:]
        similarity = left @ right.T
        if first == start:
            same = ids[start:stop, None] == ids[start:same_until]
            similarity[:, : same_until - start].masked_fill_(same, -2)  # below any margin
        active = similarity.gt_(margin)
        if first == start:
            active[:, : stop - start].triu_(1)
        # The similarities of the active pairs add up row by row in their gradient.
        toward = active @ right
        total += (toward * left).sum(dim=1).double().sum()
        total -= margin * active.sum(dim=1).double().sum()
        if wanted:
            gradient[start:stop] += toward
            gradient[first:].addmm_(active.T, left)
    if not wanted:
        return total, None
    gradient.mul_(weight.to(unit.dtype))
    return total, torch.empty_like(gradient).index_copy_(0, classes.order, gradient)


def _row_blocks(classes: Classes, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Blocks of rows sorted by class: start, stop, first column, end of same-class columns.

    Where the counts can be read without waiting for a device, blocks end where classes do, so
    that a block of one class needs no column of its own class, and others need few masks.
    """
    size = len(classes.order)
    counts_at_hand = _vectors.at_hand(classes.order)
    if not counts_at_hand:
        for start in range(0, size, most):
            yield start, min(start + most, size), start, size
        return
    start = end = 0
    for count in classes.counts.tolist():
        if count >= most or end + count - start > most:
            if end > start:
                yield start, end, start, end
            start = end
        end += count
        if count >= most:
            for begin in range(start, end, most):
                yield begin, min(begin + most, end), end, end
            start = end
    if end > start:
        yield start, end, start, end


def _squared(
    unit: Tensor, classes: Classes, weight: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of ``S^2`` over pairs of different classes; weighted gradient."""
    size, width = unit.shape
    if size <= width:
        similarity = unit @ unit.T
        similarity.masked_fill_(classes.ids[:, None] == classes.ids, 0)
        total = similarity.square().sum(dtype=torch.float64) / 2
        gradient = similarity.mul_(2 * weight.to(unit.dtype)) @ unit if wanted else None
        return total, gradient
    return _squared_by_moments(unit, classes, weight, wanted)


def _squared_by_moments(
    unit: Tensor, classes: Classes, weight: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
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
    scale = 2 * weight.to(unit.dtype)
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
        for rows in _padded(classes, width):
            present = (rows >= 0)[:, :, None]
            members = unit[rows] * present
            similarity = members @ members.mT
            total -= similarity.square().sum(dtype=torch.float64)
            if gradient is not None:
                own = (similarity @ members).mul_(scale)
                gradient[rows[rows >= 0]] -= own[present[:, :, 0]]
    return total / 2, gradient


def _padded(classes: Classes, width: int) -> list[Tensor]:
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
