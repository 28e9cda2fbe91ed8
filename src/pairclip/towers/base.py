"""What every image tower offers, whatever model is inside."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import ImageProcessingMixin

from pairclip._tensors import bytes_of
from pairclip.towers import adapters, freezing

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


class VisionTower(nn.Module):
    """An image encoder together with the preprocessing that it was trained with.

    Made by `load_tower`. Calling it takes pixel values ``[B, 3, H, W]`` and gives embeddings
    ``[B, D]``, not normalised.

    With PEFT, ``peft.get_peft_model(tower, config)`` puts adapters into this very tower, whose
    `save_pretrained` and `fingerprint` then see the merged weights.

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

    preprocess: Callable[[Any], Tensor]

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

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order; NotImplementedError if neither CLIP nor SigLIP."""
        raise self._lacks("blocks")

    def _depths(self) -> dict[str, int]:
        """How deep each parameter is: 0 before the blocks, i in block i from 1, then one more."""
        raise self._lacks("blocks")

    def _projection(self) -> nn.Module:
        """The linear projection that comes last, or a ValueError that says what does."""
        raise self._lacks("projection")

    def freeze(
        self,
        names: str | Sequence[str] | None = None,
        *,
        all_but_last: int | None = None,
        all_but: str | Sequence[str] | None = None,
    ) -> tuple[int, int]:
        """Choose which parameters train, and print how many do. Give one of the three.

        Where PEFT put adapters in, nothing is unfrozen: the weights that it froze stay frozen,
        and adapters outside the choice are frozen too.

        Args:
            names: Parameters to freeze; all others stay as they are. A name as in
                ``tower.named_parameters()``, that of a module with all within it, a pattern such
                as ``"*.bias"`` (`fnmatch`), or ``"projection"``; or several.
            all_but_last: Only the last so many blocks, and what comes after them (a norm, and
                the projection or pooling head), train. With 0, only what comes after.
            all_but: Only these train, named as in `names`.

        Returns:
            The numbers of trainable and of all parameters.

        Raises:
            ValueError: If not exactly one is given, `all_but_last` is more than there are
                blocks, or a name matches nothing; the nearest names are listed.
            NotImplementedError: For blocks or projection of a tower that is neither CLIP nor
                SigLIP.

        Example:
            >>> from pairclip.towers import random_tower
            >>> tower = random_tower(depth=3)
            >>> tower.freeze(all_but_last=1)
            Trainable: 8,992 of 32,480 parameters (27.7 %), 1 of 3 blocks.
            (8992, 32480)
            >>> tower.freeze(all_but="projection")
            Trainable: 384 of 32,480 parameters (1.2 %), 0 of 3 blocks.
            (384, 32480)
        """
        freezing.freeze(self, names, all_but_last=all_but_last, all_but=all_but)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        trainable, total = sum(size for size, trains in sizes if trains), sum(s for s, _ in sizes)
        percent = 100 * trainable / max(total, 1)
        print(
            f"Trainable: {trainable:,} of {total:,} parameters ({percent:.1f} %)"
            f"{self._trainable_blocks()}."
        )
        return trainable, total

    def split(self, k: int) -> tuple[VisionTower, VisionTower]:
        """Cut into a trunk, up to the last `k` blocks, and a head: those blocks and what follows.

        Both share this tower's modules: training the head trains the tower. The trunk's features
        can be computed once, by `pairclip.cache_features`, and the head be trained on them.
        Put adapters of PEFT into the tower before, not into its parts.

        Args:
            k: Blocks of the head, from 0 to all.

        Returns:
            The trunk, from pixel values ``[B, 3, H, W]`` to features ``[B, T, H]`` (T tokens of
            hidden size H), without gradient and always in evaluation mode; and the head, from
            features to embeddings ``[B, D]``, whose ``preprocess`` takes features ``[T, H]`` of
            one image. Save the tower, not its parts.

        Raises:
            ValueError: If `k` is more than there are blocks.
            NotImplementedError: For a tower that is neither CLIP nor SigLIP, or whose model has
                another `forward` than its class.

        Example:
            >>> import torch
            >>> from pairclip.towers import random_tower
            >>> tower = random_tower(depth=3)
            >>> trunk, head = tower.split(1)
            >>> pixels = torch.rand(2, 3, 16, 16)
            >>> trunk(pixels).shape
            torch.Size([2, 5, 32])
            >>> torch.equal(head(trunk(pixels)), tower(pixels))
            True
        """
        raise self._lacks("split")

    def fingerprint(self) -> str:
        """SHA-256 of all that decides an embedding: weights, settings and preprocessing.

        The same in every process, on every device and after `save_pretrained` and `load_tower`
        (which loads in float32). Adapters of PEFT count as merged. A plain transform is known by
        its ``repr``.

        Returns:
            64 hexadecimal digits.

        Example:
            >>> from torch import nn
            >>> from torchvision import transforms
            >>> from pairclip import load_tower
            >>> tower = load_tower(nn.Flatten(), image_processor=transforms.ToTensor())
            >>> len(tower.fingerprint())
            64
        """
        digest = hashlib.sha256(self.settings().encode())
        for name, value in sorted(self._merged_weights().items()):
            digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(bytes_of(value))
        return digest.hexdigest()

    def _merged_weights(self) -> dict[str, Tensor]:
        """What `save_pretrained` writes: plain names, with adapters of PEFT merged."""
        return adapters.merged(self.model).state_dict()

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

    def settings(self) -> str:
        """What decides an embedding beside the weights."""
        return _description(self.preprocess)

    def _trainable_blocks(self) -> str:
        """Ends what `freeze` prints."""
        return ""

    def _lacks(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"A tower around {type(self.model).__name__} has no `{what}`: CLIP and SigLIP towers "
            "have it."
        )


def tower_of(model: object) -> VisionTower:
    """The tower itself, or the one inside what `peft.get_peft_model` made of it."""
    tower = adapters.without_wrapper(model)
    if not isinstance(tower, VisionTower):
        raise TypeError(
            f"`tower` must be a VisionTower, got {type(tower).__name__}. "
            "`pairclip.load_tower` makes one of any module."
        )
    return tower


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards every part has its own mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _description(transform: Any) -> str:
    """The same text for the same preprocessing, today and in another process."""
    if isinstance(transform, Preprocess):
        return _description(transform.transform)
    if isinstance(transform, ImageProcessingMixin):
        settings = transform.to_dict()
        # Which processor of texts it was once saved with doesn't change an image.
        kept = {name: settings[name] for name in settings if "processor_class" not in name}
        return json.dumps(kept, sort_keys=True, default=str)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(transform))
