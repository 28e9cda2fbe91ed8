"""Datasets of your own: whatever has len() and [i] -> (image, label)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from pairclip.datasets.labels import ids_and_names
from pairclip.datasets.source import Source

# Where datasets of torchvision and its likes keep their files, some with a label beside each.
_FILE_ATTRIBUTES = ("samples", "imgs", "_image_files", "_images")


class OwnSource(Source):
    """A map-style dataset; all is read once for the labels if it doesn't tell them."""

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, Mapping):
            raise TypeError(
                f"`dataset` must be one dataset, got several under {list(dataset)}. Choose one, "
                "for instance `dataset['train']`."
            )
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                "`dataset` must have len() and [i] -> (image, label), got "
                f"{type(dataset).__name__}."
            )
        ids, names = ids_and_names(self.told_labels(dataset), len(dataset))
        given = getattr(dataset, "classes", None)
        if names is None and isinstance(given, (list, tuple)) and not target_transform(dataset):
            names = [str(name) for name in given]
        super().__init__(dataset, ids, names)

    @staticmethod
    def takes(dataset: Any) -> bool:
        """Whether this is how it is read: as the last resort."""
        return True

    @staticmethod
    def told_labels(dataset: Any) -> Any:
        """The labels as its items have them, found by reading each item."""
        warnings.warn(
            f"{type(dataset).__name__} does not tell its labels, so all its {len(dataset)} images "
            "are read once to find them. Give it a `targets` attribute to avoid that.",
            stacklevel=2,
        )
        return [
            _item(dataset, index)[1]
            for index in tqdm(range(len(dataset)), desc="Reading labels", disable=None)
        ]

    def image(self, index: int) -> Any:
        """The image of the item."""
        return _item(self.dataset, index)[0]

    def path(self, index: int) -> str | None:
        """The file in the list of files, where it has one."""
        for name in _FILE_ATTRIBUTES:
            files = getattr(self.dataset, name, None)
            if isinstance(files, Sequence) and len(files) > index:
                entry = files[index][0] if isinstance(files[index], tuple) else files[index]
                if isinstance(entry, (str, os.PathLike)):
                    return str(entry)
        return None

    def held(self, index: int) -> Any:
        """Its values in `TensorDataset.tensors`, or in `data` as torchvision's datasets have it."""
        images: Any = getattr(self.dataset, "data", None)
        if isinstance(self.dataset, TensorDataset):
            images = self.dataset.tensors[0]
        holds = isinstance(images, (list, np.ndarray, Tensor)) and len(images) > index
        return images[index] if holds else None


def target_transform(dataset: Any) -> Any:
    """What changes the labels of a torchvision dataset, if anything does."""
    return getattr(dataset, "target_transform", None)


def _item(dataset: Any, index: int) -> tuple[Any, Any]:
    item = dataset[index]
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise TypeError(
            f"`dataset[{index}]` must be a pair (image, label), got {type(item).__name__}."
        )
    return item[0], item[1]
