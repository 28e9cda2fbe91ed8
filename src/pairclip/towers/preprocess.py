"""From an image to the pixel values that a tower takes."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin

from pairclip._randomness import random_state, random_state_kept
from pairclip.datasets.rgb import as_rgb

# What no tower was trained on: bytes that were never, or twice, divided by 255.
_MOST, _LEAST_RANGE = 100.0, 0.1
_PIXELS_AT_ONCE = 16 * 224 * 224
# The image processors that compute in PyTorch, by the class they share in transformers 5 and 4.
_IN_TORCH = {"TorchvisionBackend", "BaseImageProcessorFast"}
_LEVELS = 2  # of 256, that what another device computes may be off


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
        if self.fixed:
            self._check_values()

    def __call__(self, image: Image.Image) -> Tensor:
        """Do what the image processor does with the image that a person sees, value by value."""
        image = self._rgb(image)
        pixel_values: Tensor
        if self.fixed:
            pixel_values = self.transform(images=image, return_tensors="pt")["pixel_values"][0]
        else:
            pixel_values = self.transform(image)
        return pixel_values

    def batch(self, images: Iterable[Image.Image]) -> list[Tensor]:
        """The pixel values of each image, value by value those of a call for each.

        Images that are read when they are asked for are held a few at a time.
        """
        if not self.fixed:
            return [self(image) for image in images]
        # A call has a price of its own, and large images of a long list fall out of the cache.
        values: list[Tensor] = []
        piece: list[Image.Image] = []
        pixels = 0
        for image in map(self._rgb, images):
            piece.append(image)
            pixels += image.width * image.height
            if pixels >= _PIXELS_AT_ONCE:
                values += self.transform(images=piece, return_tensors="pt")["pixel_values"]
                piece, pixels = [], 0
        if piece:
            values += self.transform(images=piece, return_tensors="pt")["pixel_values"]
        return values

    def on_device(self, images: Sequence[Tensor] | Tensor, device: torch.device) -> Tensor:
        """The pixel values of images that are bytes already, computed on a device.

        Args:
            images: RGB as a person sees it, uint8 ``[3, H, W]`` each, or ``[B, 3, H, W]``.
            device: Where to resize and normalise.

        Returns:
            ``[B, 3, image_size, image_size]`` there: on the CPU those of a call for each image, and
            on another device at most two of 256 levels off, which `check_device` sees to.
        """
        if isinstance(images, Tensor):
            sent = [*images.to(device, non_blocking=True)]  # one copy instead of many
        else:
            sent = [image.to(device, non_blocking=True) for image in images]
        values: Tensor = self.transform(
            images=sent, device=device, input_data_format="channels_first", return_tensors="pt"
        )["pixel_values"]
        return values

    def check_device(self, device: torch.device) -> None:
        """Raise a ValueError unless `on_device` computes there what a call does."""
        if not any(kind.__name__ in _IN_TORCH for kind in type(self.transform).__mro__):
            raise ValueError(
                "`on_device` needs an image processor of transformers that computes in PyTorch, "
                f"and the tower's preprocessing is {type(self.transform).__name__}. Leave "
                "`on_device` out."
            )
        white, black = (self(Image.new("RGB", (48, 48), color)) for color in ("white", "black"))
        level, size = (white - black) / 255, white.shape[-1]
        for image in (noise_image(), noise_image(2 * size + 1, 3 * size)):
            here, there = self(image), self.on_device([as_bytes(image)], device)[0].cpu()
            furthest = float(((here - there) / level).abs().max())
            if not furthest <= _LEVELS:
                raise ValueError(
                    f"`on_device` would give the tower other pixel values: on {device} they are "
                    f"off by {furthest:.1f} of 256 levels. Leave `on_device` out."
                )

    def check_steady(self) -> None:
        """Raise a ValueError if it draws at random, so that an image has many embeddings."""
        if self.fixed:
            return
        image = noise_image()
        with random_state_kept():
            before = random_state()
            first, *others = (self(image) for _ in range(3))
            is_random = random_state() != before
        if is_random or not all(torch.equal(first, other) for other in others):
            raise ValueError(
                "The tower's preprocessing draws at random, so an image would have another "
                "embedding each time. Load the tower with the transform of an evaluation "
                "(`image_processor=`), and give random transforms to the dataset to train on."
            )

    def _check_values(self) -> None:
        values = self(noise_image()).flatten(1)
        lowest, highest = float(values.min()), float(values.max())
        widest = float((values.amax(1) - values.amin(1)).max())
        if max(abs(lowest), abs(highest)) > _MOST or widest < _LEAST_RANGE:
            settings = {
                name: getattr(self.transform, name, None)
                for name in ("do_rescale", "rescale_factor", "do_normalize", "image_std")
            }
            raise ValueError(
                f"The image processor makes pixel values from {lowest:g} to {highest:g} of images "
                f"of eight bits, with {settings}. Towers take values of about -3 to 3: rescale by "
                "1/255, once, and normalise after that."
            )

    @staticmethod
    def _rgb(image: Image.Image) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"`image` must be one PIL image, got {type(image).__name__}. "
                "Make one with `PIL.Image.fromarray` or `PIL.Image.open`; cached features go to "
                "the head of `tower.split(k)`."
            )
        # Images of `LabelledImages` are upright and on white, and have nothing else to tell.
        return image if image.mode == "RGB" and not image.info else as_rgb(image)


def as_bytes(image: Image.Image) -> Tensor:
    """An RGB image as uint8 ``[3, H, W]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noise_image(height: int = 48, width: int = 48, *, seed: int = 0) -> Image.Image:
    """An image with all values of eight bits, the same each time.

    It is square: a preprocess may leave it to the images to be of the tower's size.
    """
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def at_size(image_processor: Any, image_size: int) -> Any:
    """A copy of an image processor of `transformers` that makes images of `image_size`.

    What it resizes to before it crops grows by the same factor.
    """
    settings = image_processor.to_dict()
    sizes = {name: settings.get(name) for name in ("size", "crop_size")}
    last = sizes["crop_size"] if settings.get("do_center_crop") else sizes["size"]
    old = max(length for length in dict(last or sizes["size"]).values() if length)
    scaled = {
        name: {side: round(n * image_size / old) for side, n in dict(size).items() if n}
        for name, size in sizes.items()
        if size
    }
    return type(image_processor).from_dict(settings, **scaled)


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


def warn_if_other(preprocess: Any, saved: Any) -> None:
    """Warn, when a tower is saved, if its library will preprocess images otherwise than it does."""
    if described(preprocess) != described(saved):
        warnings.warn(
            "The saved folder has the preprocessing of the model's library, not the "
            "`image_processor` that this tower was loaded with: give it to `load_tower` again.",
            stacklevel=5,
        )
