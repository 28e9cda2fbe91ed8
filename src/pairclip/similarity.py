"""Cosine similarities of embeddings: item by item, and class by class."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pairclip import _checks
from pairclip._vectors import (
    Classes,
    class_squares,
    class_sums,
    finite_unit_rows,
    group_by_slot,
    highest,
    products,
    unit_rows,
)

# Rows compared at once by `nearest_neighbors`, and similarities by `similarity_matrix`. The system
# hands out more than 32 MiB page by page, which takes as long as the product.
_QUERY_ROWS, _CORPUS_ROWS = 512, 8192
_CELLS = 1 << 22

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
    rows = unit_rows(_checks.as_embeddings("a", a, finite=True))
    columns = rows
    if b is not None:
        columns = unit_rows(_checks.as_embeddings("b", b, finite=True))
        if columns.shape[1] != rows.shape[1]:
            raise ValueError(
                f"`a` and `b` must have the same embedding size, got {rows.shape[1]} and "
                f"{columns.shape[1]}."
            )
        columns = columns.to(rows)
    if block_size is None:
        block_size = max(1, _CELLS // max(1, len(columns)))
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
        block = products(rows[start : start + block_size], columns).clamp_(-1, 1)
        target = out[start : start + block_size]
        if isinstance(target, Tensor):
            target.copy_(block)
        else:
            target[...] = block.cpu().numpy()
    return out


def nearest_neighbors(
    queries: Embeddings,
    corpus: Embeddings | None = None,
    k: int = 10,
    *,
    block_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of a corpus for each query, exactly.

    Neither set is copied as a whole: a corpus of half precision, or a `numpy.memmap`, takes the
    memory of one block at a time.

    Args:
        queries: Shape ``[N, D]``, floating point, any length.
        corpus: Shape ``[M, D]``; None searches `queries` for each other, each without its own
            row (but not without its duplicates).
        k: Rows to find, at most M, or N - 1 without a corpus.
        block_size: Rows of the corpus compared at once; None picks.

    Returns:
        Cosines in ``[-1, 1]``, descending, and the rows of the corpus that have them, int64, both
        ``[N, k]``. Among equals the lower row comes first. Tensors on the device of `queries`;
        float32 (float64 for float64 queries).

    Raises:
        ValueError: If shapes don't fit, an embedding is not finite or `k` is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import torch
        >>> from pairclip.similarity import nearest_neighbors
        >>> corpus = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
        >>> scores, rows = nearest_neighbors(torch.tensor([[0.0, 2.0]]), corpus, 2)
        >>> scores
        tensor([[1.0000, 0.8000]])
        >>> rows
        tensor([[2, 1]])
    """
    _checks.check_embeddings("queries", queries)
    own = corpus is None
    searched = queries if corpus is None else corpus
    if not own:
        _checks.check_embeddings("corpus", searched)
        if searched.shape[1] != queries.shape[1]:
            raise ValueError(
                f"`queries` and `corpus` must have the same embedding size, got "
                f"{queries.shape[1]} and {searched.shape[1]}."
            )
    k = _checks.check_positive_int("k", k)
    if k > len(searched) - own:
        raise ValueError(
            f"`k` must be at most the number of {'other rows' if own else 'rows of `corpus`'}, "
            f"{len(searched) - own}, got {k}."
        )
    block_size = _CORPUS_ROWS if block_size is None else block_size
    _checks.check_positive_int("block_size", block_size)
    device = queries.device if isinstance(queries, Tensor) else torch.device("cpu")
    precise = queries.dtype in (torch.float64, np.float64)
    options: dict[str, Any] = {
        "device": device,
        "dtype": torch.float64 if precise else torch.float32,
    }
    best = torch.full((len(queries), k), -torch.inf, **options)
    rows = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    for first in range(0, len(searched), block_size):
        block = _unit_block("queries" if own else "corpus", searched, first, block_size, options)
        for start in range(0, len(queries), _QUERY_ROWS):
            part = slice(start, start + _QUERY_ROWS)
            unit = _unit_block("queries", queries, start, _QUERY_ROWS, options)
            scores = products(unit, block)
            if own:
                # The diagonal of the whole matrix runs through these places, or past the block.
                scores.diagonal(start - first).fill_(-torch.inf)
            new, columns = highest(scores, min(k, len(block)))
            best[part], places = highest(torch.cat([best[part], new], dim=1), k)
            rows[part] = torch.cat([rows[part], columns + first], dim=1).gather(1, places)
    return best.clamp_(-1, 1), rows


def _unit_block(
    name: str, source: Embeddings, start: int, size: int, options: dict[str, Any]
) -> Tensor:
    rows = source[start : start + size]
    if not isinstance(rows, Tensor):
        rows = torch.from_numpy(np.array(rows, dtype=rows.dtype.newbyteorder("=")))
    return finite_unit_rows(name, rows.detach().to(**options), first_row=start)


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
    rows = unit_rows(_checks.as_embeddings("embeddings", embeddings, finite=True))
    labels = _checks.as_labels("labels", labels, length=len(rows)).to(rows.device)
    classes, of_row = labels.unique(return_inverse=True)
    grouped = group_by_slot(of_row, len(classes))
    if reduction == "centroids":
        unit = unit_rows(class_sums(rows, grouped))
        return (unit @ unit.T).clamp_(-1, 1), classes
    return totals_of(rows, grouped).mean_cosines(0, len(classes)), classes


class ClassTotals(NamedTuple):
    """What the mean cosines between classes follow from, in memory linear in their number."""

    sums: Tensor  # [C, D] float64: sum of each class's unit rows
    squares: Tensor  # [C] float64: sum of their squared lengths
    counts: Tensor  # [C] float64

    def mean_cosines(self, start: int, stop: int) -> Tensor:
        """Rows of `class_similarity_matrix` from one class up to another, ``[stop - start, C]``."""
        some = slice(start, stop)
        # In place: with many classes these are large.
        means = self.sums[some] @ self.sums.T
        means.diagonal(start).sub_(self.squares[some])
        pairs = self.counts[some, None] * self.counts
        pairs.diagonal(start).sub_(self.counts[some])
        means.div_(pairs).clamp_(-1, 1)
        # Rounding may leave a lone item's total other than 0, so 0 / 0 is not relied on.
        means.diagonal(start)[self.counts[some] == 1] = torch.nan
        return means


def totals_of(rows: Tensor, classes: Classes) -> ClassTotals:
    """The totals of unit rows."""
    sums, squares = class_sums(rows, classes), class_squares(rows, classes)
    return ClassTotals(sums, squares, classes.counts.double())
