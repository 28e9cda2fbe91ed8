"""The kinds of dataset, and views of them: subsets and joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from pairclip.datasets.features import FeaturesSource
from pairclip.datasets.folders import FolderSource
from pairclip.datasets.hugging_face import HuggingFaceSource
from pairclip.datasets.image_folder import ImageFolderSource
from pairclip.datasets.labels import join_classes
from pairclip.datasets.own import OwnSource
from pairclip.datasets.pairs import PairSource
from pairclip.datasets.rgb import Say
from pairclip.datasets.source import Source
from pairclip.datasets.torchvision import TorchvisionSource

# The first that takes a dataset reads it; the last one takes all.
KINDS = (
    FeaturesSource,
    FolderSource,
    PairSource,
    HuggingFaceSource,
    ImageFolderSource,
    TorchvisionSource,
    OwnSource,
)


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
        return _subset(dataset)
    if isinstance(dataset, ConcatDataset) and (
        type(dataset).__getitem__ is ConcatDataset.__getitem__
    ):
        return JoinedSource(dataset)
    return next(kind for kind in KINDS if kind.takes(dataset))(dataset)


class Composite(Source):
    """Items of other sources; where each is, `place` says."""

    def place(self, index: int) -> tuple[Source, int]:
        """The source that an item is of, and its index there."""
        raise NotImplementedError

    def image(self, index: int) -> Any:
        """That of the item."""
        source, index = self.place(index)
        return source.image(index)

    def decode(self, index: int, say: Say, shorter_side: int | None) -> Image.Image:
        """That of the item, as its own source decodes it unless this one says how."""
        source, index = self.place(index)
        return source.decode(
            index, say, self.shorter_side if shorter_side is None else shorter_side
        )

    def check_label(self, index: int) -> None:
        """That of the item."""
        source, index = self.place(index)
        source.check_label(index)

    def path(self, index: int) -> str | None:
        """That of the item."""
        source, index = self.place(index)
        return source.path(index)

    def values(self, index: int) -> Any:
        """That of the item."""
        source, index = self.place(index)
        return source.values(index)

    def identity(self, index: int) -> bytes | None:
        """That of the item."""
        source, index = self.place(index)
        return source.identity(index)


class View(Composite):
    """Some items of another dataset, or all of them seen otherwise.

    Args:
        dataset: What was given.
        whole: That dataset.
        indices: The items, int64 ``[N]``, of which negative ones count from the end; None for all.
        classes: Class ids of the whole and their names, where they are other ones.
        shorter_side: At which its images are decoded, where that is another one.
    """

    def __init__(
        self,
        dataset: Any,
        whole: Source,
        indices: Tensor | None = None,
        *,
        classes: tuple[Tensor, list[str] | None] | None = None,
        shorter_side: int | None = None,
    ) -> None:
        labels, names = classes or (whole.labels, whole.class_names)
        if indices is None:
            indices = torch.arange(len(labels), device="cpu")
        self._whole = whole
        self._indices = torch.where(indices < 0, indices + len(labels), indices)
        super().__init__(dataset, labels[self._indices], names)
        self.in_memory, self.of_features = whole.in_memory, whole.of_features
        self.shorter_side = shorter_side
        self.unreadable = whole.unreadable
        self.system = None if whole.system is None else whole.system[self._indices]

    def place(self, index: int) -> tuple[Source, int]:
        """In the whole."""
        return self._whole, int(self._indices[index])

    def column(self, name: str) -> Sequence[Any] | None:
        """That of the whole, at the items."""
        values = self._whole.column(name)
        return None if values is None else [values[index] for index in self._indices.tolist()]


def _subset(dataset: Subset[Any]) -> View:
    whole = source_of(dataset.dataset)
    indices = torch.from_numpy(np.array(dataset.indices, dtype=np.int64))
    # Of the tuple itself, not of what opened it.
    if PairSource.takes(dataset.dataset) and len(whole.labels) > 2 and (abs(indices) < 2).all():
        _refuse_pair("A subset")
    return View(dataset, whole, indices)


def _refuse_pair(what: str) -> None:
    raise ValueError(
        f"{what} of `(images, labels)` has the items of a tuple of length two, as torch and "
        "`random_split` see it. Take it of `LabelledImages((images, labels))`."
    )


class JoinedSource(Composite):
    """Datasets one after the other, their classes joined by name."""

    def __init__(self, dataset: ConcatDataset[Any]) -> None:
        if any(PairSource.takes(part) for part in dataset.datasets):
            _refuse_pair("A `ConcatDataset`")
        self._parts = parts = [source_of(part) for part in dataset.datasets]
        self._ends = np.cumsum([len(part.labels) for part in parts])
        labels, names = join_classes(*((part.labels, part.class_names) for part in parts))
        super().__init__(dataset, torch.cat(labels), names)
        self.in_memory = all(part.in_memory for part in parts)
        self.of_features = parts[0].of_features
        self.unreadable = [problem for part in parts for problem in part.unreadable]
        if any(part.of_features != self.of_features for part in parts):
            raise ValueError(
                "The joined datasets are images and cached features. Join one kind, for instance "
                "by `cache_features` of the images too."
            )
        if any(part.system is not None for part in parts):
            self.system = torch.cat(
                [
                    torch.zeros(len(part.labels), dtype=torch.bool, device="cpu")
                    if part.system is None
                    else part.system
                    for part in parts
                ]
            )

    def place(self, index: int) -> tuple[Source, int]:
        """In the part that it is in."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - int(self._ends[part - 1] if part else 0)

    def column(self, name: str) -> Sequence[Any] | None:
        """Those of the parts, if all have it."""
        columns = [part.column(name) for part in self._parts]
        if any(values is None for values in columns):
            return None
        return [value for values in columns for value in values or ()]
