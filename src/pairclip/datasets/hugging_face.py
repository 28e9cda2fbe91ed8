"""Datasets of the library `datasets`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pairclip.datasets.labels import ids_and_names
from pairclip.datasets.source import Source


class HuggingFaceSource(Source):
    """A `datasets.Dataset` with one column of images and one of labels."""

    def __init__(self, dataset: Any) -> None:
        self._column, label = _columns(dataset.features)
        # A format says what rows look like to others, and may leave columns out.
        plain = dataset.with_format(None)
        labels = plain.select_columns([label]).with_format("numpy")[:][label]
        ids, names = ids_and_names(labels, len(dataset))
        super().__init__(dataset, ids, getattr(dataset.features[label], "names", None) or names)
        self._plain = plain
        self._transformed = dataset.format["type"] == "custom"  # by `set_transform`
        self._images = plain.select_columns([self._column])
        # Encoded, as the files are: decoded by what decodes those of every kind of dataset.
        feature = type(dataset.features[self._column])(decode=False)
        self._encoded = self._images.cast_column(self._column, feature)

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read."""
        features = getattr(dataset, "features", None)
        return (
            isinstance(features, Mapping)
            and hasattr(dataset, "with_format")
            and hasattr(dataset, "__len__")  # which a stream lacks
        )

    def image(self, index: int) -> Any:
        """The file or its bytes; or what a transform of the dataset makes of the row."""
        if self._transformed:
            row = self.dataset[index]
            if self._column not in row:
                raise TypeError(
                    f"The transform of the dataset must give its column {self._column!r}, got "
                    f"{list(row)}. Leave preprocessing to the tower: `dataset.reset_format()`."
                )
            return row[self._column]
        encoded = self._encoded[index][self._column]
        if encoded is None:
            raise ValueError("there is no image in the row.")
        if encoded["bytes"] is not None:
            return encoded["bytes"]
        path = encoded["path"]
        return path if os.path.isfile(path) else self._images[index][self._column]

    def column(self, name: str) -> Sequence[Any] | None:
        """One of the dataset's columns."""
        if name not in self._plain.column_names:
            return None
        values: Sequence[Any] = self._plain.select_columns([name])[:][name]
        return values

    def path(self, index: int) -> str | None:
        """The file, where the row has no bytes of its own."""
        encoded = self._encoded[index][self._column] or {}
        path = encoded.get("path")
        is_file = path is not None and encoded.get("bytes") is None and os.path.isfile(path)
        return str(path) if is_file else None


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
