"""An order of classes in which like ones stand together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform


def similarity_order(similarity: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Rows of a class similarity matrix as a dendrogram has them, so that like classes meet.

    Average linkage of ``1 - similarity``, with the branches turned as Bar-Joseph, Gifford and
    Jaakkola do (2001, "Fast optimal leaf ordering for hierarchical clustering"). The diagonal
    does not matter.
    """
    if len(similarity) < 3:
        return np.arange(len(similarity))
    distances = 1 - (similarity + similarity.T) / 2
    np.fill_diagonal(distances, 0)
    condensed = squareform(distances.clip(min=0), checks=False)
    return leaves_list(linkage(condensed, "average", optimal_ordering=True)).astype(np.int64)
