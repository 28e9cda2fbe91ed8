"""The images of a fit: those of its dataset, and after them those to keep where they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pairclip import _checks
from pairclip._randomness import SamplerStream, sampler_generator
from pairclip.datasets import LabelledImages
from pairclip.embedding import open_images
from pairclip.samplers.decks import Indices, deal

NO_LABEL = -1


class FitImages:
    """All images of a fit, read like a `LabelledImages`; those to keep have the label -1.

    Args:
        data: The dataset.
        keep: Images to keep, labelled or not, or None.

    Attributes:
        data: The dataset.
        keep: The images to keep, opened, or None.
        labels: Class id of each image, int64 ``[N]``.

    Raises:
        ValueError: If the one has images and the other has features, or the dataset has negative
            labels, which would be taken for those of images to keep.
    """

    def __init__(self, data: LabelledImages, keep: Any) -> None:
        self.data = data
        self.keep: LabelledImages | None = None
        self.labels, self.class_names = data.labels, data.class_names
        self.of_features = data.of_features
        self.in_memory = data.source.in_memory
        if keep is None:
            return
        self.keep = open_images(keep)
        if self.keep.of_features != data.of_features:
            kinds = ["images", "cached features"][:: -1 if data.of_features else 1]
            raise ValueError(
                f"`keep` must be of the same kind as `dataset`, which has {kinds[0]}, got "
                f"{kinds[1]}. Cache the features of both, by the same trunk, or of none."
            )
        if int(data.labels.min()) < 0:
            raise ValueError(
                f"`dataset` has the label {int(data.labels.min())}, and with `keep` a negative one "
                "says that an image has no class. Give it class ids from 0."
            )
        self.labels = torch.cat([data.labels, torch.full([len(self.keep)], NO_LABEL, device="cpu")])
        self.in_memory = self.in_memory and self.keep.source.in_memory

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image in RGB, or its features, and its class id."""
        if self.keep is None or index < len(self.data):
            return self.data[index]
        return self.keep[index - len(self.data)][0], NO_LABEL


class KeptDeck(NamedTuple):
    """Deals the images to keep to the batches of a fit, all of them equally often, up to one.

    A deck is shuffled and dealt to its end before an image comes again, over epochs too. What an
    epoch gets follows from (seed, epoch), and no image comes twice in one batch.
    """

    items: Indices
    per_batch: int
    seed: int

    def epoch(self, epoch: int, num_batches: int) -> list[list[int]]:
        """Indices for each batch of an epoch."""
        chunks = np.full(num_batches, self.per_batch, np.int64)
        rng = sampler_generator(SamplerStream.KEPT, self.seed, epoch)
        dealt_before = epoch * int(chunks.sum())
        dealt = deal(self.items, chunks, rng, seed=self.seed, dealt_before=dealt_before)
        rows: list[list[int]] = dealt.reshape(num_batches, self.per_batch).tolist()
        return rows


def kept_deck(
    images: FitImages, share: float, sampler: Any, batch_size: int, seed: int
) -> KeptDeck:
    """The deck that gives each batch its share of images to keep.

    They are part of `batch_size`, or come in addition to the batches of a `sampler`: an even
    number, so that the others can be pairs, and processes divide them.
    """
    _checks.check_in("(0, 1)", "keep_share", share)
    if sampler is None:
        _checks.check_positive_int("batch_size", batch_size)
        count, left = 2 * round(share * batch_size / 2), batch_size
    else:
        size = getattr(sampler, "batch_size", None)
        if not isinstance(size, int):
            raise TypeError(
                "`keep_share` is a share of the sampler's `batch_size`, and `sampler` "
                f"{type(sampler).__name__} has none. Set that attribute."
            )
        count = 2 * round(share / (1 - share) * size / 2)
        left, batch_size = count + 1, size + count
    if not 0 < count < left:
        raise ValueError(
            f"`keep_share` {share} of a batch of {batch_size} images is {count} images to keep. "
            "Choose another share, or larger batches."
        )
    first, last = len(images.data), len(images)
    if count > last - first:
        raise ValueError(
            f"`keep_share` {share} is {count} different images in each batch, and `keep` has "
            f"{last - first}. Give more images, or a smaller share."
        )
    return KeptDeck(np.arange(first, last), count, seed)
