"""A pair of images and labels."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor

from pairclip.datasets.labels import ids_and_names
from pairclip.datasets.source import Source


class PairSource(Source):
    """``(images, labels)``: arrays, tensors, lists, columns of a table."""

    def __init__(self, dataset: tuple[Any, Any]) -> None:
        super().__init__(dataset, *ids_and_names(dataset[1], len(dataset[0])))
        self.in_memory = type(dataset[0]) in (np.ndarray, Tensor)

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        return isinstance(dataset, tuple) and len(dataset) == 2

    def image(self, index: int) -> Any:
        """Read by place, as the labels are, also from a pandas column with an index."""
        images = self.dataset[0]
        return images.iloc[index] if hasattr(images, "iloc") else images[index]

    def path(self, index: int) -> str | None:
        """The image itself, where it is a path."""
        image = self.image(index)
        return str(image) if isinstance(image, (str, os.PathLike)) else None

    def values(self, index: int) -> Any:
        """Its values, unless images are made when they are asked for."""
        images = self.dataset[0]
        return images[index] if isinstance(images, (list, np.ndarray, Tensor)) else None
