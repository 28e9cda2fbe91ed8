"""Items of a stream as they wait in a buffer, and how a batch of them becomes pixel values."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pairclip._randomness import Stream, random_state_kept, seed_all
from pairclip.datasets.checking import Problem
from pairclip.datasets.notices import Notices
from pairclip.datasets.rgb import as_rgb


class StreamPlace(NamedTuple):
    """How far a run over a stream has come.

    Attributes:
        epoch: From 0.
        batch: Batches of it that were drawn.
        digest: Of what the stream gave in this epoch until then; None where nobody knows.
    """

    epoch: int
    batch: int
    digest: int | None


class StreamItem(NamedTuple):
    """One image and its class id, not decoded."""

    position: int
    label: int
    image: Any
    feature: Any  # of Hugging Face, if it decodes the image

    def digest(self, before: int) -> int:
        """A number for what the stream gave until now, the same for the same items."""
        image = self.image
        if self.feature is not None and image is not None:
            image = image["bytes"]
        encoded = image if isinstance(image, bytes) else b""
        return zlib.crc32(encoded, zlib.crc32(f"{self.label} ".encode(), before))

    def picture(self) -> Any:
        """What `as_rgb` takes."""
        if self.feature is None or self.image is None:
            return self.image
        if self.image["bytes"] is not None:
            return self.image["bytes"]
        path = self.image["path"]  # perhaps within an archive, or of another machine
        return path if os.path.isfile(path) else self.feature.decode_example(self.image)

    @property
    def path(self) -> str | None:
        """Its file, where the stream tells."""
        path = self.image if self.feature is None or self.image is None else self.image["path"]
        return str(path) if isinstance(path, (str, os.PathLike)) else None


class StreamBatch(NamedTuple):
    """Items that were drawn together."""

    place: StreamPlace  # after it
    items: list[StreamItem]
    share: slice  # those that are decoded; of the others one may take the place of another


class PixelBatch(NamedTuple):
    """What a batch became."""

    pixel_values: Tensor
    labels: Tensor
    place: StreamPlace
    unreadable: list[Problem]


@dataclass(eq=False)
class Decoder(Dataset[Any]):
    """Pixel values and labels of a batch; what is random follows from the places of its items.

    Args:
        preprocess: Makes pixel values of an image.
        seed: Decides what that draws.
        notices: Takes what is remarkable about an image.
        skips: Whether another image of its class takes the place of one that can't be read.
    """

    preprocess: Callable[[Any], Tensor]
    seed: int
    notices: Notices
    _: KW_ONLY
    skips: bool

    def __getitems__(self, batch: StreamBatch) -> PixelBatch:
        """The batch (a `DataLoader` asks for its items at once)."""
        preprocess: Any = self.preprocess
        items, unreadable = batch.items[batch.share], dict[Problem, None]()
        images = (self._read(item, batch.items, unreadable) for item in items)
        with random_state_kept():
            if getattr(preprocess, "fixed", False):  # a tower's, which draws nothing at random
                values = preprocess.batch(images)
            else:
                values = []
                for item, image in zip(items, images, strict=True):
                    seed_all(Stream.ITEM, self.seed, batch.place.epoch, item.position)
                    values.append(preprocess(image))
        labels = torch.tensor([item.label for item in items], device="cpu")
        return PixelBatch(torch.stack(values), labels, batch.place, [*unreadable])

    def _read(
        self, item: StreamItem, batch: list[StreamItem], unreadable: dict[Problem, None]
    ) -> Image.Image:
        """The image, or that of the first item of its class that can be read."""
        others = [other for other in batch if other.label == item.label and other is not item]
        for each in [item, *(others if self.skips else ())]:
            try:
                return as_rgb(each.picture(), say=self.notices.say)
            except Exception as error:
                reason = str(error) or type(error).__name__
                if not self.skips:
                    raise ValueError(
                        f"Item {each.position} of the stream can't be read: {reason}"
                    ) from error
                unreadable[Problem(each.position, each.path, reason)] = None
        raise ValueError(
            f"None of the {len(others) + 1} items of class {item.label} in a batch can be read, "
            f"first item {next(iter(unreadable)).index} of the stream: "
            f"{next(iter(unreadable)).reason}"
        )


def as_it_is(batch: Any) -> Any:
    """What a `DataLoader` is to do with a batch that is one already."""
    return batch


def item_of(
    position: int, item: Any, keys: tuple[str, str], ids: Mapping[str, int], feature: Any
) -> StreamItem:
    """An item as the stream gave it, with its class id; `feature` decodes its image, if any does.

    Raises:
        ValueError: If it has no class id. The message names it.
        TypeError: If it is no pair and no dict.
    """
    if isinstance(item, Mapping):
        missing = [key for key in keys if key not in item]
        if missing:
            raise ValueError(
                f"Item {position} of the stream has no {missing}, but {list(item)}. Name its "
                "keys with `image=` and `label=`."
            )
        item = tuple(item[key] for key in keys)
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise TypeError(
            f"Item {position} of the stream must be a pair (image, label) or a dict, got "
            f"{type(item).__name__}."
        )
    image, label = item
    if isinstance(label, bytes):  # as a WebDataset has it, of a file that may end in a line break
        label = label.decode(errors="surrogateescape").strip()
    if isinstance(label, str):
        label = ids.get(label, int(label) if label.isdecimal() else label)
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        values = np.asarray(label).ravel().tolist()
        label = values[0] if len(values) == 1 else label
    if not isinstance(label, int) or label == -1 or not -(2**63) <= label < 2**63:
        raise ValueError(
            f"Item {position} of the stream must have a class id, or a name in `class_names`, "
            f"got {label!r}."
        )
    return StreamItem(position, int(label), image, feature)
