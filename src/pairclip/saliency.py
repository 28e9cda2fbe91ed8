"""Which parts of an image make it similar to another one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pairclip import _checks
from pairclip._vectors import unit_rows
from pairclip.datasets import LabelledImages, as_rgb
from pairclip.embedding import embed
from pairclip.towers import VisionTower


class PairSaliency(NamedTuple):
    """How similar two images are, and how much each part of the first one adds to that.

    Attributes:
        similarity: Cosine of their embeddings.
        falls: How much the cosine falls where a part is covered, float32 ``[grid, grid]``, rows
            from the top.
    """

    similarity: float
    falls: Tensor


def occlusion_saliency(
    tower: VisionTower,
    image: Any,
    other: Any,
    *,
    grid: int = 8,
    window: int = 2,
    batch_size: int = 64,
) -> PairSaliency:
    """Say how much each part of an image adds to its similarity to another image.

    A window of the mean colour of the image covers one part after the other. Where the similarity
    falls, that part made the two alike; where it rises, that part kept them apart. A cell's value
    is the mean over the windows that cover it. This asks nothing of a tower but embeddings, so it
    works for every one; it takes ``(grid - window + 1) ** 2`` of them.

    Args:
        tower: Embeds both images.
        image: What is explained: an image of any kind that `LabelledImages` takes.
        other: What it is compared with.
        grid: Cells on each side.
        window: Cells on each side of what is covered at once, at most `grid`.
        batch_size: Images per forward pass.

    Returns:
        The similarity, and how much of it each part makes. Parts of the image that the tower's
        preprocessing cuts off make none.

    Raises:
        ValueError: If `grid` or `window` is out of range, or the image has fewer pixels than the
            grid has cells on a side.

    References:
        Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks" (occlusion);
        Stylianou, Souvenir and Pless 2019, "Visualizing deep similarity networks" (of pairs).

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from pairclip import occlusion_saliency
        >>> from pairclip.towers import random_tower
        >>> image = Image.new("RGB", (64, 64), "white")
        >>> image.paste("red", (0, 0, 32, 32))
        >>> saliency = occlusion_saliency(random_tower(), image, image, grid=4)
        >>> round(saliency.similarity, 3), saliency.falls.shape
        (1.0, torch.Size([4, 4]))
    """
    _checks.check_positive_int("grid", grid)
    _checks.check_positive_int("window", window)
    if window > grid:
        raise ValueError(f"`window` must be at most `grid` {grid}, got {window}.")
    picture, compared = as_rgb(image), as_rgb(other)
    if min(picture.size) < grid:
        raise ValueError(
            f"`grid` must be at most the pixels of the image's sides, got {grid} for "
            f"{picture.width} x {picture.height}."
        )
    covered = _Covered(picture, compared, grid, window)
    # Alone, since it may be one process of several that writes a page.
    rows = unit_rows(embed(tower, LabelledImages(covered), batch_size=batch_size, alone=True))
    similarity = rows[1:] @ rows[0]
    places = grid - window + 1
    falls = (similarity[0] - similarity[1:]).view(1, 1, places, places)
    spread = falls.new_ones(1, 1, window, window)
    total, windows = (
        torch.nn.functional.conv_transpose2d(each, spread)[0, 0]
        for each in (falls, torch.ones_like(falls))
    )
    return PairSaliency(float(similarity[0]), total / windows)


class _Covered(Dataset[tuple[Image.Image, int]]):
    """The other image, the whole image, and the image with each window covered."""

    def __init__(self, image: Image.Image, other: Image.Image, grid: int, window: int) -> None:
        self.image, self.other, self.window = image, other, window
        self.mean = tuple(np.asarray(image).mean(axis=(0, 1)).round().astype(int).tolist())
        self.lefts, self.tops = (
            np.linspace(0, side, grid + 1).round().astype(int).tolist() for side in image.size
        )
        self.places = grid - window + 1
        self.targets = [0] * (2 + self.places**2)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index < 2:
            return (self.other, self.image)[index], 0
        row, column = divmod(index - 2, self.places)
        image = self.image.copy()
        box = (self.lefts[column], self.tops[row])
        end = (self.lefts[column + self.window], self.tops[row + self.window])
        image.paste(self.mean, (*box, *end))
        return image, 0
