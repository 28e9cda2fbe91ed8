"""Preprocessed images, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from pairclip.datasets import LabelledImages
from pairclip.datasets.loading import HostLoader
from pairclip.towers.preprocess import Preprocess


class Pixels(Dataset[Tensor]):
    """Preprocessed images of a dataset."""

    def __init__(self, images: LabelledImages, preprocess: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """What the tower takes of one image."""
        image, _ = self.images[index]
        return self.preprocess(image)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The same of several (a `DataLoader` asks for those of a batch at once)."""
        if isinstance(self.preprocess, Preprocess):
            return self.preprocess.batch(self.images[index][0] for index in indices)
        return [self[index] for index in indices]


def pixel_batches(
    pixels: Pixels,
    *,
    batch_size: int,
    num_workers: int,
    worker_init_fn: Callable[[int], None] | None = None,
    share: Sequence[int] | None = None,
    pin_memory: bool = False,
    collate_fn: Callable[[list[Tensor]], Any] | None = None,
) -> HostLoader:
    """All items, or a share, in order and in batches; no random generator is touched."""
    return HostLoader(
        pixels,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=worker_init_fn,
        sampler=share,
        pin_memory=pin_memory,
        collate_fn=collate_fn,
    )


def open_images(images: Any) -> LabelledImages:
    """A dataset, or images alone, whose labels are then 0."""
    if are_images(images):
        images = (images, np.zeros(len(images), np.int64))
    return LabelledImages(images)


def are_images(images: Any) -> bool:
    """Whether these are images alone, not a labelled dataset."""
    if isinstance(images, Sequence) and not isinstance(images, tuple):
        return not len(images) or not isinstance(images[0], (tuple, list))
    return hasattr(images, "ndim") and images.ndim == 4
