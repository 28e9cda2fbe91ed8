"""Images as segments of an index."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pairclip._vectors import unit_rows
from pairclip.datasets import LabelledImages
from pairclip.embedding import are_images, embed_images, open_images
from pairclip.index.segments import ROWS, Segment
from pairclip.towers import VisionTower


def images_of(name: str, dataset: Any) -> tuple[LabelledImages, bool]:
    """The images of an argument, and whether they have labels of their own."""
    if isinstance(dataset, (str, os.PathLike)):
        raise TypeError(
            f"`{name}` must be a dataset or a list of images, got the path '{dataset}'. List "
            "the files, for instance `sorted(Path(folder).rglob('*.jpg'))`."
        )
    return open_images(dataset), not are_images(dataset)


def embedded(
    tower: VisionTower, images: LabelledImages, dtype: torch.dtype, **options: Any
) -> Segment:
    """The images' embeddings and paths."""
    embeddings = embed_images(tower, images, **options)
    paths = [images.source.path(index) for index in range(len(images))]
    return Segment(
        stored_rows(embeddings, dtype),
        labels=None,
        paths=paths if any(path is not None for path in paths) else None,
    )


def joined_labels(
    data: LabelledImages, labelled: bool, has_labels: bool, known: list[str] | None
) -> tuple[Tensor | None, list[str] | None]:
    """Labels of images that come to those of an index, and the class names of both."""
    names = data.class_names if labelled else None
    for what, ours, theirs in (
        ("labels", has_labels, labelled),
        ("class names", known is not None, names is not None),
    ):
        if ours and not theirs:
            raise ValueError(f"`images` must have {what}, as the index has them.")
        if theirs and not ours:
            raise ValueError(f"`images` must have no {what}, since the index has none.")
    if not labelled:
        return None, known
    if known is None or names is None:
        return data.labels, None
    there = {*known}
    joined = [*known, *(name for name in names if name not in there)]
    ids = {name: id_ for id_, name in enumerate(joined)}
    return torch.tensor([ids[name] for name in names], device="cpu")[data.labels], joined


def check_dtype(dtype: object) -> None:
    """Raise a ValueError unless an index holds embeddings of this type."""
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"`dtype` must be torch.float16 or torch.float32, got {dtype}.")


def stored_rows(embeddings: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows as an index holds them."""
    units = torch.empty_like(embeddings, dtype=dtype)
    for start in range(0, len(embeddings), ROWS):
        units[start : start + ROWS] = unit_rows(embeddings[start : start + ROWS])
    return units
