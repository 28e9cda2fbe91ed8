"""Look at every image of a collection before anything is trained on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Subset

from pairclip.collection.check import Check, Finding, Item
from pairclip.collection.faults import copies, looks, of_classes
from pairclip.datasets import LabelledImages
from pairclip.datasets.checking import Problem, look_at
from pairclip.embedding import embed_images
from pairclip.evaluation.suspects import suspect_labels
from pairclip.towers import VisionTower

_SMALL = 16  # side of a small copy
_ANIMATED = {"GIF", "TIFF", "WEBP", "PNG"}  # not MPO: photographs with a preview


def check_collection(
    parts: Mapping[str, Any],
    tower: VisionTower | None = None,
    *,
    same_image: float = 0.98,
    doubtful: float = 0.4,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Check:
    """Read every image, and list what a person should look at.

    That is images that can't be read; the same image twice, in two classes or two parts; labels
    that may be wrong; classes of one image, in one part alone, or of nearly the same name; images
    of one colour, tiny, very long, of unusual modes, or several in a file.

    Args:
        parts: Datasets that `LabelledImages` takes by the name of their part, such as train and
            test.
        tower: Looks for labels that don't fit; None leaves that out.
        same_image: Two images are the same from this cosine of their small copies on, 16 x 16
            pixels without the mean colour: copies that were resized or compressed, not crops.
        doubtful: How much better another class must fit for a label to be listed, as
            `suspect_labels` has it.
        batch_size: Images per forward pass.
        num_workers: Processes that load images.

    Returns:
        What was found.

    Raises:
        TypeError: If `parts` is no dict.
        ValueError: If `parts` is empty, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from pairclip import check_collection
        >>> images = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
        >>> images[3] = images[0]
        >>> check = check_collection({"all": (images, ["cat", "cat", "dog", "dog"])})
        >>> check.findings["The same image in different classes"][0].items
        (0, 3)
    """
    if not isinstance(parts, Mapping):
        raise TypeError(f"`parts` must be a dict of datasets by name, got {type(parts).__name__}.")
    if not parts:
        raise ValueError("`parts` must have at least one dataset, got none.")
    datasets = {part: LabelledImages(images) for part, images in parts.items()}
    items = [
        Item(part, index, images.source.known_path(index), _class_name(images, index))
        for part, images in datasets.items()
        for index in range(len(images))
    ]
    check = Check(datasets, items, suspicion=np.full(len(items), np.nan))
    small = _read(check, num_workers)
    readable = [place for place, item in enumerate(items) if item.problem is None]
    unreadable = [place for place, item in enumerate(items) if item.problem is not None]
    check.drop |= {*unreadable}
    findings = {
        "Images that can't be read": [
            Finding(str(items[place].problem), (place,)) for place in unreadable
        ],
        **copies(check, readable, small, same_image),
        "Labels that may be wrong": []
        if tower is None
        else _doubtful(check, readable, tower, doubtful, batch_size, num_workers),
        **of_classes(check),
        **looks(check, readable, small),
    }
    check.findings = {kind: of_kind for kind, of_kind in findings.items() if of_kind}
    return check


def _class_name(images: LabelledImages, index: int) -> str:
    label = int(images.labels[index])
    return str(label) if images.class_names is None else images.class_names[label]


class _Look(NamedTuple):
    """What is kept of an image."""

    size: tuple[int, int]
    mode: str
    frames: int
    pixels: str
    small: npt.NDArray[np.float32]


def _look(image: Image.Image, path: str | None) -> _Look:
    mode, frames = image.mode, 1
    if path is not None and os.path.isfile(path):  # and not relative to a folder of the dataset
        with Image.open(path) as file:
            mode = file.mode
            frames = getattr(file, "n_frames", 1) if file.format in _ANIMATED else 1
    pixels = hashlib.sha256(str(image.size).encode() + image.tobytes()).hexdigest()
    copy = image.resize((_SMALL, _SMALL), Image.Resampling.BOX)
    values = np.asarray(copy, dtype=np.float32)
    # Without its mean colour, an image of one colour is 0, and a recoloured copy the same.
    return _Look(image.size, mode, frames, pixels, (values - values.mean(axis=(0, 1))).ravel())


def _read(check: Check, num_workers: int) -> npt.NDArray[np.float32]:
    """Fill in what is seen of each item; return small copies ``[N, 16 * 16 * 3]``."""
    small = np.zeros((len(check.items), _SMALL * _SMALL * 3), dtype=np.float32)
    answers = (
        each
        for images in check.parts.values()
        for each in look_at(images.source, _look, num_workers=num_workers)
    )
    for place, (item, each) in enumerate(zip(check.items, answers, strict=True)):
        if isinstance(each, Problem):
            item.problem = " ".join(each.reason.split())
        else:
            item.size, item.mode, item.frames = each.size, each.mode, each.frames
            item.pixels = each.pixels
            small[place] = each.small
    return small


def _doubtful(
    check: Check,
    readable: list[int],
    tower: VisionTower,
    doubtful: float,
    batch_size: int,
    num_workers: int,
) -> list[Finding]:
    """Images that another class fits better, the clearest first; their doubts are filled in."""
    names = sorted({check.items[place].class_name for place in readable})
    if len(names) < 2:
        return []
    embeddings = []
    for part, images in check.parts.items():
        rows = [check.items[place].index for place in readable if check.items[place].part == part]
        if rows:
            subset = Subset(images, rows)
            embeddings.append(
                embed_images(tower, subset, batch_size=batch_size, num_workers=num_workers)
            )
    number = {name: i for i, name in enumerate(names)}
    labels = [number[check.items[place].class_name] for place in readable]
    suspicion = suspect_labels(torch.cat(embeddings), labels)
    check.suspicion[readable] = suspicion.scores.numpy()
    order = suspicion.scores.argsort(descending=True).tolist()
    return [
        Finding(
            f"{check.items[readable[i]].class_name}, or {names[int(suspicion.classes[i])]}? "
            f"({suspicion.scores[i]:.2f})",
            (readable[i],),
        )
        for i in order
        if suspicion.scores[i] >= doubtful
    ]
