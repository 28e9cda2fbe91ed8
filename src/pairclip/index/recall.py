"""What approximate search misses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pairclip._vectors import unit_rows
from pairclip.index.faiss import FaissIndex
from pairclip.index.image_index import ImageIndex
from pairclip.index.segments import ROWS

_ROUNDING = 1e-6  # of a cosine in float32


def search_recall(
    exact: ImageIndex, approximate: FaissIndex | ImageIndex, queries: Any, k: int = 10
) -> float:
    """Share of the k nearest images that an approximate index finds too: what approximating costs.

    An image that is as near as the last of these may stand in its place: of copies, any counts.

    Args:
        exact: The index that finds all.
        approximate: Another index of the same images in the same order.
        queries: Images or embeddings ``[Q, D]``, as for `ImageIndex.search`.
        k: How many each finds; all, where there are fewer images.

    Returns:
        The mean over queries; in ``[0, 1]``.

    Raises:
        ValueError: As for `ImageIndex.search`; or if the indices have different numbers of images,
            or there is no query.
        TypeError: As for `ImageIndex.search`; or if `exact` is no `ImageIndex`.

    Example:
        >>> import torch
        >>> from pairclip import ImageIndex
        >>> from pairclip.index import search_recall
        >>> index = ImageIndex(torch.eye(4), labels=None, class_names=None, paths=None,
        ...     fingerprint="none")
        >>> search_recall(index, index.to_faiss("Flat"), torch.eye(4), k=1)
        1.0
    """
    if not isinstance(exact, ImageIndex):
        raise TypeError(f"`exact` must be an ImageIndex, got {type(exact).__name__}.")
    if len(exact) != len(approximate):
        raise ValueError(
            f"`approximate` must have the images of `exact`, got {len(approximate)} images and "
            f"{len(exact)}. Make it anew: `exact.to_faiss(...)`."
        )
    embeddings = exact._searcher.embeddings_of(queries)
    scores, true = exact.nearest_neighbors(embeddings, k)
    if not len(true):
        raise ValueError("`queries` must have at least one image or embedding, got none.")
    # Images are embedded once, unless the other index has another tower.
    same = exact.fingerprint == approximate.fingerprint
    _, answered = approximate.nearest_neighbors(embeddings if same else queries, k)
    hits = (answered[:, :, None] == true[:, None, :]).any(dim=2)
    others = (~hits & (answered >= 0)).nonzero()
    rows = exact.embeddings if len(others) else embeddings
    for some in others.split(ROWS):
        query, column = some.T
        near = _cosines(embeddings[query], rows[answered[query, column]])
        hits[query, column] = near >= scores[query, -1] - _ROUNDING
    return float(hits.double().mean())


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return (unit_rows(a).float() * unit_rows(b).float()).sum(dim=1)
