"""What every image tower offers, whatever model is inside."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import ImageProcessingMixin


class Preprocess:
    """One PIL image of any mode -> the pixel values ``[3, H, W]`` that a tower takes.

    An object of its own, so that workers of a `DataLoader` get it without the tower's weights.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert to RGB and do what the image processor does, value by value."""
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"`image` must be one PIL image, got {type(image).__name__}. "
                "Make one with `PIL.Image.fromarray` or `PIL.Image.open`."
            )
        image = image.convert("RGB")
        pixel_values: Tensor
        if isinstance(self.transform, ImageProcessingMixin):
            pixel_values = self.transform(images=image, return_tensors="pt")["pixel_values"][0]
        else:
            pixel_values = self.transform(image)
        return pixel_values


class VisionTower(nn.Module):
    """An image encoder together with the preprocessing that it was trained with.

    Made by `load_tower`. Calling it takes pixel values ``[B, 3, H, W]`` and gives embeddings
    ``[B, D]``, not normalised.

    Attributes:
        preprocess: Callable from one PIL image, of any mode and size, to float pixel values
            ``[3, image_size, image_size]``.
        embedding_dim: Size ``D`` of an embedding.
        image_size: Height and width, in pixels, of the images that the model takes.

    Example:
        >>> from PIL import Image
        >>> from torch import nn
        >>> from torchvision import transforms
        >>> from pairclip import load_tower
        >>> resize = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
        >>> tower = load_tower(nn.Flatten(), image_processor=resize)
        >>> tower.image_size, tower.embedding_dim
        (8, 192)
        >>> tower.preprocess(Image.new("L", (40, 30))).shape
        torch.Size([3, 8, 8])
    """

    def __init__(
        self, model: nn.Module, preprocess: Preprocess, *, embedding_dim: int, image_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocess = preprocess
        self.embedding_dim = embedding_dim
        self.image_size = image_size
        self.training = model.training

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode ``[B, 3, H, W]``, as `preprocess` makes them, into ``[B, D]``."""
        embeddings: Tensor = self.model(pixel_values)
        return embeddings

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `transformers` and `load_tower` load again.

        Args:
            folder: Where to write; made if it is missing.

        Raises:
            NotImplementedError: For a tower that is neither CLIP nor SigLIP.
        """
        raise NotImplementedError(
            f"A tower around {type(self.model).__name__} has no `save_pretrained`: CLIP and SigLIP "
            "towers have it. Save this one with `safetensors.torch.save_model(tower, path)`."
        )
