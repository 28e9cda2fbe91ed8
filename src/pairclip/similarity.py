"""Cosine similarities of embeddings: item by item, and class by class."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pairclip import _checks

Embeddings = Tensor | npt.NDArray[Any]


def similarity_matrix(
    a: Embeddings,
    b: Embeddings | None = None,
    *,
    block_size: int | None = None,
    out: Any = None,
) -> Any:
    """Cosine similarity of every row of one set with every row of another.

    Args:
        a: Shape ``[N, D]``, floating point, any length. A zero row has similarity 0 with
            everything. Half precision is computed in float32.
        b: Shape ``[M, D]``; None compares `a` with itself.
        block_size: Rows of `a` computed at once, for the memory of a step between; None picks.
        out: Tensor or array of shape ``[N, M]`` to write into, a `numpy.memmap` for instance,
            so that the whole matrix is never in memory.

    Returns:
        Cosines in ``[-1, 1]``, shape ``[N, M]``: `out` if it was given, else a tensor on the
        device of `a`, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: If shapes don't fit or an embedding is not finite.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> from pairclip import similarity_matrix
        >>> similarity_matrix(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]])
    """
    rows = _checks.unit_rows(_checks.as_embeddings("a", a, finite=True))
    columns = rows
    if b is not None:
        columns = _checks.unit_rows(_checks.as_embeddings("b", b, finite=True))
        if columns.shape[1] != rows.shape[1]:
            raise ValueError(
                f"`a` and `b` must have the same embedding size, got {rows.shape[1]} and "
                f"{columns.shape[1]}."
            )
        columns = columns.to(rows)
    if block_size is None:
        block_size = max(1, 2**24 // max(1, len(columns)))
    _checks.check_positive_int("block_size", block_size)
    shape = (len(rows), len(columns))
    if out is None:
        out = rows.new_empty(shape)
    elif not isinstance(out, (Tensor, np.ndarray)):
        raise TypeError(f"`out` must be a tensor or a NumPy array, got {type(out).__name__}.")
    elif not (out.is_floating_point() if isinstance(out, Tensor) else out.dtype.kind == "f"):
        raise TypeError(f"`out` must be floating point, got {out.dtype}.")
    elif tuple(out.shape) != shape:
        raise ValueError(f"`out` must have shape {list(shape)}, got {list(out.shape)}.")
    for start in range(0, len(rows), block_size):
        block = (rows[start : start + block_size] @ columns.T).clamp_(-1, 1)
        target = out[start : start + block_size]
        if isinstance(target, Tensor):
            target.copy_(block)
        else:
            target[...] = block.cpu().numpy()
    return out


def class_similarity_matrix(
    embeddings: Embeddings,
    labels: Any,
    *,
    reduction: Literal["pairs", "centroids"] = "pairs",
) -> tuple[Tensor, Tensor]:
    """How similar the images of one class are to those of another.

    Args:
        embeddings: Shape ``[N, D]``, floating point, any length.
        labels: Class of each row, shape ``[N]``, integer.
        reduction: ``"pairs"`` is the mean cosine over the pairs of different items of the two
            classes, NaN for a class of one item with itself. ``"centroids"`` is the cosine of
            the classes' mean unit embeddings.

    Returns:
        The matrix, float64 ``[C, C]``, and the class id of each row, ``[C]``, ascending.

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite or `reduction` is unknown.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> from pairclip import class_similarity_matrix
        >>> matrix, classes = class_similarity_matrix(torch.eye(3), torch.tensor([5, 5, 9]))
        >>> matrix
        tensor([[0., 0.],
                [0., nan]], dtype=torch.float64)
        >>> classes
        tensor([5, 9])
    """
    _checks.check_choice("reduction", reduction, ("pairs", "centroids"))
    rows = _checks.unit_rows(_checks.as_embeddings("embeddings", embeddings, finite=True))
    labels = _checks.as_labels("labels", labels, length=len(rows)).to(rows.device)
    classes, of_row, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(classes), rows.shape[1], dtype=torch.float64, device=rows.device)
    # In pieces, so that the float64 copy of the rows stays small.
    for piece, its_classes in zip(rows.split(8192), of_row.split(8192), strict=True):
        sums.index_add_(0, its_classes, piece.double())
    if reduction == "centroids":
        unit = _checks.unit_rows(sums)
        return (unit @ unit.T).clamp_(-1, 1), classes
    totals = sums @ sums.T
    pairs = (counts[:, None] * counts).double()
    own = torch.zeros_like(sums[:, 0]).index_add_(
        0, of_row, rows.square().sum(dim=1, dtype=torch.float64)
    )
    totals.diagonal().sub_(own)
    pairs.diagonal().sub_(counts)
    # Rounding may leave a lone item's total other than 0, so 0 / 0 is not relied on.
    return (totals / pairs).clamp_(-1, 1).where(pairs > 0, torch.nan), classes
