"""Preprocessed images, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pairclip.datasets import LabelledImages
from pairclip.datasets.loading import HostLoader
from pairclip.towers.preprocess import Preprocess, as_bytes


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


def batches_on(
    device: torch.device,
    images: LabelledImages,
    prepare: Any,
    share: range,
    *,
    on_device: bool,
    batch_size: int,
    num_workers: int,
    worker_init_fn: Callable[[int], None] | None,
) -> Iterator[Tensor]:
    """What a tower takes of a share of the images, in order and in batches, on its device."""
    if not len(share):
        return
    if on_device and (whole := _bytes_in_memory(images)) is not None:
        for start in share[::batch_size]:
            yield prepare.on_device(whole[start : min(start + batch_size, share.stop)], device)
        return
    loader = HostLoader(
        Pixels(images, as_bytes if on_device else prepare),
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=worker_init_fn,
        sampler=share,
        pin_memory=device.type == "cuda",
        collate_fn=list if on_device else None,  # images of any size
    )
    for batch in loader:
        if on_device:
            yield prepare.on_device(batch, device)
        else:
            yield batch.to(device, non_blocking=True)


def _bytes_in_memory(images: LabelledImages) -> Tensor | None:
    """Images that are one array or tensor of bytes, ``[N, 3, H, W]``, on whatever device."""
    source = images.source
    array = source.dataset[0] if source.in_memory else None
    if isinstance(array, np.ndarray) and array.ndim == 4 and array.shape[3] == 3:
        # PyTorch shares no memory that it may not write to, or that goes backwards.
        shared = array.dtype == np.uint8 and array.flags.writeable and min(array.strides) > 0
        array = torch.from_numpy(array).permute(0, 3, 1, 2) if shared else None
    if not isinstance(array, Tensor) or array.dtype != torch.uint8 or array.ndim != 4:
        return None
    return array if array.shape[1] == 3 and len(array) == len(images) else None


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
