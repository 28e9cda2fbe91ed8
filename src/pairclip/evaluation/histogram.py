"""Pairs of images counted by similarity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PairHistogram:
    """Pairs of images counted by similarity.

    Attributes:
        edges: Ends of the bins, float64 ``[bins + 1]``.
        same: Pairs of one class in each bin, int64 ``[bins]``.
        different: Pairs of different classes in each bin, int64 ``[bins]``.

    Example:
        >>> import torch
        >>> from pairclip import evaluate_embeddings
        >>> histogram = evaluate_embeddings(torch.eye(4), torch.tensor([0, 0, 1, 1])).histogram
        >>> int(histogram.same.sum()), int(histogram.different.sum())
        (2, 4)
    """

    edges: FloatArray
    same: IntArray
    different: IntArray
