"""From an image to the pixel values that a tower takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin

_PIXELS_AT_ONCE = 16 * 224 * 224


class Preprocess:
    """One PIL image of any mode -> the pixel values ``[3, H, W]`` that a tower takes.

    An object of its own, so that workers of a `DataLoader` get it without the tower's weights.

    Attributes:
        fixed: Whether it is an image processor of `transformers`, which draws nothing at random
            and takes several images at once.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform
        self.fixed = isinstance(transform, ImageProcessingMixin)

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert to RGB and do what the image processor does, value by value."""
        image = self._rgb(image)
        pixel_values: Tensor
        if self.fixed:
            pixel_values = self.transform(images=image, return_tensors="pt")["pixel_values"][0]
        else:
            pixel_values = self.transform(image)
        return pixel_values

    def batch(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The pixel values of each image, value by value those of a call for each."""
        if not self.fixed:
            return [self(image) for image in images]
        # A call has a price of its own, and large images of a long list fall out of the cache.
        pieces: dict[int, list[Image.Image]] = {}
        pixels = 0
        for image in map(self._rgb, images):
            pieces.setdefault(pixels // _PIXELS_AT_ONCE, []).append(image)
            pixels += image.width * image.height
        return [
            pixel_values
            for piece in pieces.values()
            for pixel_values in self.transform(images=piece, return_tensors="pt")["pixel_values"]
        ]

    @staticmethod
    def _rgb(image: Image.Image) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"`image` must be one PIL image, got {type(image).__name__}. "
                "Make one with `PIL.Image.fromarray` or `PIL.Image.open`; cached features go to "
                "the head of `tower.split(k)`."
            )
        return image if image.mode == "RGB" else image.convert("RGB")


def grey_image(width: int, height: int) -> Image.Image:
    """An image to learn from what a preprocess makes of one."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def at_size(image_processor: Any, image_size: int) -> Any:
    """A copy of an image processor of `transformers` that makes images of `image_size`."""
    settings = image_processor.to_dict()
    sizes = {
        name: {side: image_size for side, length in dict(settings[name]).items() if length}
        for name in ("size", "crop_size")
        if settings.get(name)
    }
    return type(image_processor).from_dict(settings, **sizes)


def described(transform: Any) -> str:
    """The same text for the same preprocessing, today and in another process."""
    if isinstance(transform, Preprocess):
        return described(transform.transform)
    if isinstance(transform, ImageProcessingMixin):
        settings = transform.to_dict()
        # Which processor of texts it was once saved with doesn't change an image.
        own = {name: settings[name] for name in settings if "processor_class" not in name}
        return json.dumps(own, sort_keys=True, default=str)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))
