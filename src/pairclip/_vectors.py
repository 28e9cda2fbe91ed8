"""What several rooms do with rows of numbers: their lengths, sums by class, the highest scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pairclip import _checks

# Rows that one float32 addition chain sums up, so that its rounding stays near 1e-6.
_CHAIN = 256
# Multiplications from which oneDNN's product is worth the call.
_LARGE = 1 << 22


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean length of each row, float64 ``[N]``; no float32 length is lost to underflow."""
    norms: Tensor
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and len(rows):
        # Float64 costs a copy of the rows, so it is left to lengths whose squares may not fit.
        norms = torch.linalg.vector_norm(rows, dim=1)
        if norms.min() > 1e-15 and norms.max() < 1e15:
            return norms.double()
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their length, without gradient; a zero row stays zero. Never `rows` itself.

    Half precision becomes float32.
    """
    rows = rows.detach()
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    return _divided(rows, row_norms(rows))


def finite_unit_rows(name: str, rows: Tensor, *, first_row: int | None = None) -> Tensor:
    """Unit rows of `name`, float32 or float64; an error if one is not finite.

    A block that starts at `first_row` has its rows counted from there in the error.
    """
    norms = row_norms(rows)
    # A length shows what the elements are, at no further look at them.
    if not norms.isfinite().all():
        _checks.check_finite(name, rows, first_row=first_row)
    return _divided(rows, norms)


def differentiable_unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets gradient 0."""
    lengths = row_norms(rows).to(rows.dtype)[:, None]
    positive = lengths != 0
    return torch.where(positive, rows / torch.where(positive, lengths, 1), 0)


def _divided(rows: Tensor, norms: Tensor) -> Tensor:
    unit = rows / norms.where(norms > 0, 1.0).to(rows.dtype)[:, None]
    # Lengths whose squares left the range of float64, or that the rows' own type can't hold well.
    low, high = (1e-150, 1e150) if rows.dtype == torch.float64 else (1e-37, 1e38)
    extreme = (norms < low) | (norms > high)
    if extreme.any():
        largest = rows[extreme].abs().amax(dim=1, keepdim=True)
        scaled = rows[extreme] / largest.where(largest > 0, 1.0)
        unit[extreme] = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True).clamp_min(1)
    return unit


def at_hand(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def products(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of each row of `left` with each of `right`, without gradient, ``[n, m]``.

    The matrix product of torch is MKL's on x86, which leaves the wider half of the registers of
    AMD's processors idle: oneDNN's takes half the time there, and is never slower.
    """
    large = left.numel() * len(right) >= _LARGE and left.dtype == torch.float32
    with torch.autocast(left.device.type, enabled=False):
        if large and at_hand(left) and _x86_with_onednn():
            with torch.no_grad():
                return F.linear(left.to_mkldnn(), right).to_dense()
        return left @ right.T


def _x86_with_onednn() -> bool:
    vectors = torch.backends.cpu.get_cpu_capability()
    return vectors.startswith("AVX") and torch.backends.mkldnn.is_available()


class Classes(NamedTuple):
    """Rows sorted by class.

    There are C class slots; slots without a row have a count of 0.
    """

    order: Tensor  # [N] rows by class
    ids: Tensor  # [N] class slot of each row, in the rows' own order
    starts: Tensor  # [C] first place of each slot in `order`
    counts: Tensor  # [C] rows of each slot, int64


def group_by_class(labels: Tensor) -> Classes:
    """Rows by the class ids that there are, ascending.

    C is their number where it is at hand. Elsewhere, where reading it would make the host wait
    for the device, C is N.
    """
    ordered, order = labels.sort(stable=True)
    first = torch.ones_like(labels)
    first[1:] = ordered[1:] != ordered[:-1]
    slots = first.cumsum(0) - 1
    size = int(slots[-1]) + 1 if at_hand(labels) else len(labels)
    return _classes(order, torch.empty_like(slots).scatter_(0, order, slots), slots, size)


def group_by_slot(ids: Tensor, size: int) -> Classes:
    """Rows by known slots, each from 0 to ``size - 1``."""
    slots, order = ids.sort(stable=True)
    return _classes(order, ids, slots, size)


def _classes(order: Tensor, ids: Tensor, slots: Tensor, size: int) -> Classes:
    edges = torch.searchsorted(slots, torch.arange(size + 1, device=slots.device))
    return Classes(order, ids, starts=edges[:-1], counts=edges.diff())


def class_sums(rows: Tensor, classes: Classes, weights: Tensor | None = None) -> Tensor:
    """Sum of the rows of each class slot, each row times its weight, float64 ``[C, D]``."""
    if not len(rows):
        return rows.new_zeros(len(classes.counts), rows.shape[1], dtype=torch.float64)
    places = torch.arange(len(rows), device=rows.device)
    slots = classes.ids[classes.order]
    first = places % _CHAIN == 0
    first[1:] |= slots[1:] != slots[:-1]
    chains = first.long().cumsum(0) - 1
    size = int(chains[-1]) + 1 if at_hand(rows) else len(rows)
    chain_starts = torch.searchsorted(chains, places[:size])
    sums = F.embedding_bag(
        classes.order,
        rows,
        chain_starts,
        mode="sum",
        per_sample_weights=None if weights is None else weights[classes.order],
    ).double()
    # A slot's chains are those from its first row's; empty slots start behind the last row.
    slot_starts = torch.cat([chains, chains[-1:] + 1])[classes.starts]
    return F.embedding_bag(places[:size], sums, slot_starts.clamp_max(size), mode="sum")


def class_squares(rows: Tensor, classes: Classes) -> Tensor:
    """Sum of the squared lengths of the rows of each class slot, float64 ``[C]``."""
    squares = torch.zeros(len(classes.counts), dtype=torch.float64, device=rows.device)
    # In pieces, so that the float64 copy of the rows stays small.
    for piece, ids in zip(rows.split(8192), classes.ids.split(8192), strict=True):
        squares.index_add_(0, ids, piece.double().square().sum(dim=1))
    return squares


def highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row, descending, and their columns; lower columns tie first."""
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if values.shape[1] > k:
        # Which of equal scores are taken is left open by `topk`.
        cut = values[:, k] == values[:, k - 1]
        values, columns = values[:, :k], columns[:, :k]
        if cut.any():
            ordered = scores[cut].sort(dim=1, descending=True, stable=True)
            columns[cut] = ordered.indices[:, :k]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
