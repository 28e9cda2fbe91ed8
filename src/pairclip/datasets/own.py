"""Datasets of your own: whatever has len() and [i] -> (image, label)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from pairclip._progress import progress
from pairclip._randomness import random_state_kept
from pairclip.datasets.labels import MISSING, ids_and_names
from pairclip.datasets.source import LabelsDiffer, Source

# Where datasets of torchvision and its likes keep their files, some with a label beside each.
_FILE_ATTRIBUTES = ("samples", "imgs", "_image_files", "_images")


class OwnSource(Source):
    """A map-style dataset; all is read once for the labels if it doesn't tell them."""

    def __init__(self, dataset: Any) -> None:
        _check_kind(dataset)
        self._targets = self.told_labels(dataset)
        ids, names = ids_and_names(self._targets, len(dataset))
        given = getattr(dataset, "classes", None)
        if names is None and isinstance(given, (list, tuple)) and not target_transform(dataset):
            if bool(((ids >= MISSING) & (ids < len(given))).all()):
                names = [str(name) for name in given]
            else:
                warnings.warn(
                    f"`classes` of {type(dataset).__name__} has {len(given)} names, and its class "
                    f"ids go from {int(ids.min())} to {int(ids.max())}, so they have no names.",
                    stacklevel=2,
                )
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
        with random_state_kept():
            return [
                _item(dataset, index)[1]
                for index in progress(range(len(dataset)), desc="Reading labels", unit="image")
            ]

    def image(self, index: int) -> Any:
        """The image of the item, whose label must be the one that was told."""
        image, label = _item(self.dataset, index)
        targets = self._targets
        target = targets.iloc[index] if hasattr(targets, "iloc") else targets[index]
        if not _same(label, target):
            raise LabelsDiffer(
                f"{type(self.dataset).__name__} tells the label {_plain(target)!r} of image "
                f"{index}, but its item has {_plain(label)!r}. Give it an attribute `targets` with "
                "the labels of its items."
            )
        return image

    def check_label(self, index: int) -> None:
        """Read the item."""
        self.image(index)

    def path(self, index: int) -> str | None:
        """The file in the list of files, where it has one."""
        for name in _FILE_ATTRIBUTES:
            files = getattr(self.dataset, name, None)
            if isinstance(files, Sequence) and len(files) > index:
                entry = files[index][0] if isinstance(files[index], tuple) else files[index]
                if isinstance(entry, (str, os.PathLike)):
                    return str(entry)
        return None

    def values(self, index: int) -> Any:
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
        what = type(item).__name__
        if isinstance(item, (tuple, list)):
            what += f" of {len(item)}"
        elif isinstance(item, Mapping):
            what += f" with {list(item)}"
        raise TypeError(
            f"`dataset[{index}]` must be a pair (image, label), got {what}. Wrap the dataset in "
            "one whose [i] gives these two."
        )
    return item[0], item[1]


def _plain(label: Any) -> Any:
    """A label as Python has it, whatever holds the one number."""
    if hasattr(label, "tolist"):  # of torch or NumPy
        label = label.tolist()
    if isinstance(label, (list, tuple)) and len(label) == 1:
        return _plain(label[0])
    return label


def _same(label: Any, target: Any) -> bool:
    if label is target:
        return True
    label, target = _plain(label), _plain(target)
    return bool(label == target) or (label != label and target != target)


def _check_kind(dataset: Any) -> None:
    """Raise a TypeError with words of its own for what looks like a dataset and is none."""
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"`dataset` must be one dataset, got several under {list(dataset)}. Choose one, for "
            "instance `dataset['train']`; columns of images and labels are given as "
            "`(images, labels)`."
        )
    if isinstance(dataset, (IterableDataset, Iterator)) or (
        hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")
    ):
        raise TypeError(
            "`dataset` must have len() and [i] -> (image, label), got the stream "
            f"{type(dataset).__name__}. Train on it through `pairclip.datasets.StreamBatches`, or "
            "make a list of it."
        )
    if hasattr(dataset, "columns") or hasattr(dataset, "column_names"):
        raise TypeError(
            f"`dataset` is a table ({type(dataset).__name__}). Name its columns: "
            "`TableDataset(table, image='path', label='label')`."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"`dataset` must have len() and [i] -> (image, label), got {type(dataset).__name__}."
        )
