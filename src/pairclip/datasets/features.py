"""Features of `cache_features`, a dataset for the head of a split tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pairclip.datasets.source import Source


class FeaturesSource(Source):
    """`CachedFeatures`, told by its attribute `of_features`."""

    of_features = True

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset, dataset.labels.clone(), dataset.class_names)

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        return getattr(dataset, "of_features", False) is True

    def image(self, index: int) -> Tensor:
        """The features ``[T, H]`` of one image."""
        features: Tensor = self.dataset[index][0]
        return features
