"""Datasets of the library `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pairclip.datasets.labels import ids_and_names
from pairclip.datasets.source import Source


class HuggingFaceSource(Source):
    """A `datasets.Dataset` with one column of images and one of labels."""

    def __init__(self, dataset: Any) -> None:
        self._column, label = _columns(dataset.features)
        labels = dataset.select_columns([label]).with_format("numpy")[:][label]
        ids, names = ids_and_names(labels, len(dataset))
        super().__init__(dataset, ids, getattr(dataset.features[label], "names", None) or names)

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        features = getattr(dataset, "features", None)
        return isinstance(features, Mapping) and hasattr(dataset, "with_format")

    def image(self, index: int) -> Any:
        """The image in the row."""
        return self.dataset[index][self._column]


def _columns(features: Mapping[str, Any]) -> tuple[str, str]:
    """Names of the image and of the label column."""
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    named = [name for name in kinds if name in ("label", "labels")]
    labels = [name for name in named if name in classes] or classes or named
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"A Hugging Face dataset must have one image and one label column, got {kinds}. "
            "Select them with `dataset.select_columns([...])`, and rename the label to 'label'."
        )
    return images[0], labels[0]
