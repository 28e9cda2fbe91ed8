"""Embeddings of images by a tower."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pairclip import _checks
from pairclip._progress import progress
from pairclip.datasets import LabelledImages
from pairclip.towers import VisionTower
from pairclip.towers.modes import evaluating
from pairclip.towers.preprocess import Preprocess


def embed_images(
    tower: VisionTower, images: Any, *, batch_size: int = 64, num_workers: int = 0
) -> Tensor:
    """Embed every image, without gradient and in evaluation mode.

    Args:
        tower: Embeds; its modes are as before afterwards.
        images: Any labelled dataset that `LabelledImages` takes (`CachedFeatures` for the head of
            a split tower), or images alone: a list of PIL images, arrays or tensors, or one array
            ``[N, H, W, 3]`` or tensor ``[N, 3, H, W]``.
        batch_size: Images per forward pass.
        num_workers: Processes that load and preprocess images; 0 does it in this one.

    Returns:
        float32 ``[N, D]`` on the CPU, not normalised.

    Raises:
        ValueError: If there are no images, one can't be read, an embedding is not finite, or the
            tower's preprocessing draws at random.

    Example:
        >>> import numpy as np
        >>> from pairclip import embed_images
        >>> from pairclip.towers import random_tower
        >>> tower = random_tower(embedding_dim=8)
        >>> embed_images(tower, np.zeros((3, 16, 16, 3), dtype=np.uint8)).shape
        torch.Size([3, 8])
    """
    _checks.check_positive_int("batch_size", batch_size)
    if isinstance(images, (str, os.PathLike)):
        raise TypeError(f"`images` must be a dataset or a list of images, got the path {images!r}.")
    if are_images(images):
        images = (images, np.zeros(len(images), np.int64))
    return embed(tower, LabelledImages(images), batch_size=batch_size, num_workers=num_workers)


def embed(
    tower: VisionTower,
    images: LabelledImages,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Tensor:
    """Embed as `embed_images` does; workers call `worker_init_fn` with their number first."""
    if isinstance(tower.preprocess, Preprocess):
        tower.preprocess.check_steady()
    loader = pixel_batches(
        Pixels(images, tower.preprocess),
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=worker_init_fn,
    )
    device = next((p.device for p in tower.parameters()), torch.device("cpu"))
    embeddings = []
    with torch.inference_mode(), evaluating(tower):
        for batch in progress(loader, desc="Embedding", unit="batch", leave=False):
            embeddings.append(tower(batch.to(device)).float().cpu())
    result = torch.cat(embeddings).clone()
    _checks.check_finite("embeddings", result)
    return result


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
) -> DataLoader[Tensor]:
    """All items in order, in batches; no random generator is touched."""
    return DataLoader(
        pixels,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=worker_init_fn,
        generator=torch.Generator(),  # else the loader draws from the caller's
    )


def are_images(images: Any) -> bool:
    """Whether these are images alone, not a labelled dataset."""
    if isinstance(images, Sequence) and not isinstance(images, tuple):
        return not len(images) or not isinstance(images[0], (tuple, list))
    return hasattr(images, "ndim") and images.ndim == 4
