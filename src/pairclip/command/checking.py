"""Look at every image of a collection before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from pairclip._progress import progress
from pairclip.command.collection import Check, Item, Problem
from pairclip.command.faults import copies, looks, of_classes
from pairclip.datasets import LabelledImages
from pairclip.embedding import embed_images
from pairclip.evaluation.suspects import suspect_labels
from pairclip.towers import VisionTower

# Cosine of the small copies of two images from which they count as the same.
SAME_IMAGE = 0.98
# How much better another class must fit for a label to be listed.
DOUBTFUL = 0.4
_SMALL = 16  # side of a small copy


def check_collection(
    parts: Mapping[str, LabelledImages],
    tower: VisionTower | None = None,
    *,
    same_image: float = SAME_IMAGE,
    doubtful: float = DOUBTFUL,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Check:
    """Read every image, and list what a person should look at.

    Args:
        parts: Labelled images by the name of their part, such as train and test.
        tower: Looks for labels that don't fit; None leaves that out.
        same_image: Cosine of the small copies of two images from which they are the same.
        doubtful: How much better another class must fit, from `suspect_labels`.
        batch_size: Images per forward pass.
        num_workers: Processes that load images for the tower.

    Returns:
        What was found.
    """
    items = [
        Item(part, index, images.source.path(index), _class_name(images, index))
        for part, images in parts.items()
        for index in range(len(images))
    ]
    check = Check(parts, items)
    small = _read(check)
    readable = [place for place, item in enumerate(items) if item.problem is None]
    check.problems = {
        "Images that can't be read": [
            Problem(str(item.problem), (place,))
            for place, item in enumerate(items)
            if item.problem is not None
        ],
        **copies(check, readable, small, same_image),
        "Labels that may be wrong": [],
        **of_classes(check),
        **looks(check, readable, small),
    }
    check.drop |= {place for place, item in enumerate(items) if item.problem is not None}
    check.suspicion = np.full(len(items), np.nan)
    if tower is not None:
        check.problems["Labels that may be wrong"] = _doubtful(
            check, readable, tower, doubtful, batch_size, num_workers
        )
    check.problems = {title: found for title, found in check.problems.items() if found}
    return check


def _class_name(images: LabelledImages, index: int) -> str:
    label = int(images.labels[index])
    return str(label) if images.class_names is None else images.class_names[label]


def _read(check: Check) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Fill in what is seen of each item; return small copies ``[N, 16 * 16 * 3]``."""
    small = np.zeros((len(check.items), _SMALL * _SMALL * 3), dtype=np.float32)

    def read(place: int) -> None:
        item = check.items[place]
        try:
            image = check.image(place)
        except (ValueError, TypeError, OSError) as error:
            item.problem = " ".join(str(error.__cause__ or error).split())
            return
        item.size = image.size
        item.mode = image.mode
        if item.path is not None:
            with Image.open(item.path) as opened:
                item.mode = opened.mode
        item.pixels = hashlib.sha256(str(image.size).encode() + image.tobytes()).hexdigest()
        copy = image.resize((_SMALL, _SMALL), Image.Resampling.BOX)
        values = np.asarray(copy, dtype=np.float32)
        # Without its mean colour, an image of one colour is 0, and a recoloured copy the same.
        small[place] = (values - values.mean(axis=(0, 1))).ravel()

    places = range(len(check.items))
    with ThreadPoolExecutor() as pool:
        for _ in progress(
            pool.map(read, places), total=len(places), desc="Reading", unit="image", leave=False
        ):
            pass
    return small


def _doubtful(
    check: Check,
    readable: list[int],
    tower: VisionTower,
    doubtful: float,
    batch_size: int,
    num_workers: int,
) -> list[Problem]:
    """Images that another class fits better, the clearest first."""
    embeddings = []
    for part, images in check.parts.items():
        rows = [check.items[place].index for place in readable if check.items[place].part == part]
        if rows:
            subset = Subset(images, rows)
            embeddings.append(
                embed_images(tower, subset, batch_size=batch_size, num_workers=num_workers)
            )
    names = sorted({check.items[place].class_name for place in readable})
    if len(names) < 2:
        return []
    number = {name: i for i, name in enumerate(names)}
    labels = [number[check.items[place].class_name] for place in readable]
    suspicion = suspect_labels(torch.cat(embeddings), labels)
    check.suspicion[readable] = suspicion.scores.numpy()
    order = suspicion.scores.argsort(descending=True).tolist()
    return [
        Problem(
            f"{check.items[readable[i]].class_name}, or {names[int(suspicion.classes[i])]}? "
            f"({suspicion.scores[i]:.2f})",
            (readable[i],),
        )
        for i in order
        if suspicion.scores[i] >= doubtful
    ]
