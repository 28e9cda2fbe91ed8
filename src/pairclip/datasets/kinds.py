"""The kinds of dataset, and views of them: subsets and joins."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from pairclip.datasets.features import FeaturesSource
from pairclip.datasets.hugging_face import HuggingFaceSource
from pairclip.datasets.own import OwnSource
from pairclip.datasets.pairs import PairSource
from pairclip.datasets.source import Source
from pairclip.datasets.torchvision import TorchvisionSource

# The first that takes a dataset reads it; the last one takes all.
KINDS = (FeaturesSource, PairSource, HuggingFaceSource, TorchvisionSource, OwnSource)


def source_of(dataset: Any) -> Source:
    """Open any dataset.

    Raises:
        ValueError: If labels don't fit the images.
        TypeError: If it is no labelled dataset.
    """
    source = getattr(dataset, "source", None)
    if isinstance(source, Source):  # `LabelledImages`
        return source
    # A subclass of a view may change the items.
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        return SubsetSource(dataset)
    if isinstance(dataset, ConcatDataset) and (
        type(dataset).__getitem__ is ConcatDataset.__getitem__
    ):
        return ConcatSource(dataset)
    return next(kind for kind in KINDS if kind.takes(dataset))(dataset)


class SubsetSource(Source):
    """Some items of another dataset, as they are."""

    def __init__(self, dataset: Subset[Any]) -> None:
        self._whole = whole = source_of(dataset.dataset)
        indices = torch.as_tensor(np.asarray(dataset.indices, dtype=np.int64))
        self._indices = torch.where(indices < 0, indices + len(whole.labels), indices)
        super().__init__(dataset, whole.labels[self._indices], whole.class_names)
        self.in_memory, self.of_features = whole.in_memory, whole.of_features

    def image(self, index: int) -> Any:
        """That of the whole."""
        return self._whole.image(int(self._indices[index]))

    def path(self, index: int) -> str | None:
        """That of the whole."""
        return self._whole.path(int(self._indices[index]))

    def held(self, index: int) -> Any:
        """That of the whole."""
        return self._whole.held(int(self._indices[index]))


class ConcatSource(Source):
    """Datasets with the same classes, one after the other."""

    def __init__(self, dataset: ConcatDataset[Any]) -> None:
        self._parts = parts = [source_of(part) for part in dataset.datasets]
        self._ends = np.cumsum([len(part.labels) for part in parts])
        names = [part.class_names for part in parts]
        if any(other != names[0] for other in names):
            raise ValueError(
                f"The joined datasets give their class ids different names: {names}. Join "
                "datasets with the same classes."
            )
        super().__init__(dataset, torch.cat([part.labels for part in parts]), names[0])
        self.in_memory = all(part.in_memory for part in parts)
        self.of_features = parts[0].of_features
        if any(part.of_features != self.of_features for part in parts):
            raise ValueError(
                "The joined datasets are images and cached features. Join one kind, for instance "
                "by `cache_features` of the images too."
            )

    def _place(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - int(self._ends[part - 1] if part else 0)

    def image(self, index: int) -> Any:
        """That of the part that it is in."""
        part, index = self._place(index)
        return part.image(index)

    def path(self, index: int) -> str | None:
        """That of the part that it is in."""
        part, index = self._place(index)
        return part.path(index)

    def held(self, index: int) -> Any:
        """That of the part that it is in."""
        part, index = self._place(index)
        return part.held(index)
