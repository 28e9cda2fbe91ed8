"""What every kind of dataset answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pairclip.datasets.notices import Notices
from pairclip.datasets.rgb import Say, as_rgb

if TYPE_CHECKING:
    from pairclip.datasets.checking import Problem


def reason_of(error: BaseException) -> str:
    """What went wrong with an image, without the path, which the message has already."""
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class LabelsDiffer(ValueError):
    """A dataset tells other labels than its items have."""


class Source:
    """One dataset, seen as images with class ids.

    A new kind of dataset is a subclass in a file of its own, made from the dataset alone, with
    ``takes(dataset) -> bool``, which says whether it is of that kind; and its place in
    `kinds.KINDS`.

    Attributes:
        dataset: What was given.
        labels: Class id of each image, int64 ``[N]``, `MISSING` for none; memory of its own.
        class_names: Name of each class id, or None.
        in_memory: Whether the images are an array or a tensor, so that reading one draws nothing
            at random.
        makes_images: Whether a PIL image that it gives is made for the caller alone.
        shorter_side: JPEG is decoded at a fraction of its size that leaves at least so many
            pixels; None decodes all of it.
        of_features: Whether the items are features of `cache_features`.
        unreadable: The images that were left out because they can't be read.
        system: Which images are no images of the collection, but hidden files or those that a
            system or an editor left there, bool ``[N]``; or None.
    """

    in_memory = False
    makes_images = False
    shorter_side: int | None = None
    of_features = False
    unreadable: Sequence[Problem] = ()
    system: Tensor | None = None

    def __init__(self, dataset: Any, labels: Tensor, class_names: list[str] | None) -> None:
        self.dataset = dataset
        self.labels = labels
        self.class_names = class_names
        self._notices = Notices()

    def image(self, index: int) -> Any:
        """The image at `index`, of any kind that `as_rgb` takes; `index` is in ``[0, N)``."""
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """The image as a person sees it.

        Raises:
            LabelsDiffer: If the item has another label than the dataset tells.
            TypeError: If it is no image. The message names it.
            ValueError: If it can't be read for another reason. The message names it.
        """
        try:
            return self.decode(
                index,
                lambda kind, words: self._notices.say(kind, f"{self.name(index)}: {words}"),
                self.shorter_side,
            )
        except LabelsDiffer:
            raise
        # Damaged files lead Pillow into errors of any kind, and an IndexError would end a loop.
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self.name(index)} can't be read: {reason_of(error)}") from error

    def decode(self, index: int, say: Say, shorter_side: int | None) -> Image.Image:
        """The image, decoded at `shorter_side`, or at its own where that is None."""
        return as_rgb(
            self.image(index),
            shorter_side=self.shorter_side if shorter_side is None else shorter_side,
            say=say,
            copy=not self.makes_images,
        )

    def name(self, index: int) -> str:
        """What a message calls an image."""
        path = self.known_path(index)
        return f"Image {index}" + (f" ({path})" if path else "")

    def known_path(self, index: int) -> str | None:
        """The path, or None too where an image is made when it is asked for, and can't be."""
        try:
            return self.path(index)
        except Exception:
            return None

    def check_label(self, index: int) -> None:
        """Raise `LabelsDiffer` if the item has another label than the dataset tells."""

    def path(self, index: int) -> str | None:
        """The file that an image is read from, where the dataset tells."""
        return None

    def column(self, name: str) -> Sequence[Any] | None:
        """A value of each image from a column, where the dataset has columns and this one."""
        read = getattr(self.dataset, "column", None)
        values: Sequence[Any] | None = read(name) if callable(read) else None
        return values

    def values(self, index: int) -> Any:
        """The image as it lies in memory, before any transform, or None where it doesn't."""
        return None

    def identity(self, index: int) -> bytes | None:
        """What tells an image from others without decoding it, if anything does."""
        path = self.path(index)
        if path is not None and os.path.isfile(path):
            status = os.stat(path)
            return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}\n".encode()
        image = self.values(index)
        if not isinstance(image, (np.ndarray, Tensor, Image.Image)):
            return None
        values = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
        flat = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{values.dtype} {list(values.shape)}\n".encode() + flat.numpy().tobytes()
