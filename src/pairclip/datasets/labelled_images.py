"""Any labelled image dataset, opened."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pairclip import _checks
from pairclip._randomness import random_state_kept
from pairclip.datasets.checking import Problem, in_words, problems_of
from pairclip.datasets.kinds import View, source_of
from pairclip.datasets.labels import MISSING, places
from pairclip.datasets.source import LabelsDiffer, Source

_ITEMS_LOOKED_AT = 8
# Twice the image size of the largest towers in use: no detail that they see is lost.
_DRAFT_SIZE = 768


class LabelledImages(Dataset[tuple[Any, int]]):
    """A labelled dataset, opened: RGB images, class ids and names, whatever its kind.

    An image is what a person sees: upright as its EXIF data says, transparency on white. Hidden
    files and folders of an `ImageFolder`, and those of a system, are left out.

    Args:
        dataset: Anything with ``len()`` and ``[i] -> (image, label)``: a torchvision dataset or
            `ImageFolder`, a `Subset` or `ConcatDataset` of those, a Hugging Face dataset, a pair
            ``(images, labels)``, a `TableDataset`, a folder with a folder for each class, or your
            own. Images may be PIL images of any mode, uint8 arrays ``[H, W]`` or ``[H, W, 3]``,
            uint8 tensors ``[3, H, W]``, or float tensors ``[3, H, W]`` in ``[0, 1]``, or paths.
            Labels may be integers or names. Or `CachedFeatures`, or a `Subset` or
            `ConcatDataset` of them.
        drop_missing: Leave out images without a label (None, NaN, an empty name, or -1), with a
            warning that counts them, instead of raising.
        relabel: Number the classes that are there from 0, for instance those of a subset for a
            loss that has one proxy for each class.
        draft_decode: Decode JPEG files that are much larger than a tower takes at 1/2, 1/4 or 1/8
            of their size, several times as fast: so that the shorter side has at least 768 pixels,
            or as many as given here. The pixels differ a little from the exact ones.
        on_error: "raise" names the first image that can't be read and stops there. "skip" reads
            every image once now and leaves out those that can't be read, with one warning that
            counts them; so that labels, batches and results are of the others, in every process.
            They are listed in `unreadable`, in an `Evaluation` and in the `History` of a fit.
        num_workers: Processes that read them; 0 does it in this one.

    Attributes:
        labels: Class id of each image, int64 ``[N]``.
        class_names: Name of each class id, or None.
        unreadable: The images that ``on_error="skip"`` left out.
        of_features: Whether the items are features of `cache_features`, for the head of a split
            tower, and not images: as they are, of one image ``[T, H]``.

    Raises:
        ValueError: If the dataset is empty, its labels don't fit its images or its items, or some
            are missing.
        TypeError: If it is no labelled dataset.

    Example:
        >>> import numpy as np
        >>> from pairclip import LabelledImages
        >>> images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> data = LabelledImages((images, ["dog", "cat"]))
        >>> data.labels, data.class_names, data[0][0].size
        (tensor([1, 0]), ['cat', 'dog'], (8, 8))
    """

    def __init__(
        self,
        dataset: Any,
        *,
        drop_missing: bool = False,
        relabel: bool = False,
        draft_decode: bool | int = False,
        on_error: Literal["raise", "skip"] = "raise",
        num_workers: int = 0,
    ) -> None:
        _checks.check_choice("on_error", on_error, ("raise", "skip"))
        if num_workers and on_error == "raise":
            raise ValueError(f"`num_workers` {num_workers} would be ignored: nothing is read now.")
        source = source_of(dataset)
        if not isinstance(dataset, LabelledImages):
            _check_some_labels(source)
        source = _labelled(source, drop_missing)
        if draft_decode is not False:
            side = _DRAFT_SIZE if draft_decode is True else draft_decode
            _checks.check_positive_int("draft_decode", side)
            source = View(source.dataset, source, shorter_side=side)
        if on_error == "skip":
            source = _readable(source, problems_of(source, num_workers=num_workers))
        if relabel:
            source = _relabelled(source)
        self.source = source
        self.unreadable: list[Problem] = list(source.unreadable)
        self.labels, self.class_names = source.labels, source.class_names
        self.dataset: Any = source.dataset
        self.of_features = source.of_features

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        classes, kind = len(self.labels.unique()), type(self.dataset).__name__
        return f"LabelledImages({len(self)} images of {classes} classes, from a {kind})"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image in RGB and its class id; an error names the image that can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}.")
        if self.of_features:
            return self.source.image(index), int(self.labels[index])
        return self.source.read(index), int(self.labels[index])


def labels_of(dataset: Any) -> Tensor:
    """Class id of each image of a dataset, where possible without decoding an image.

    Args:
        dataset: What `LabelledImages` takes. One that doesn't tell its labels is gone through
            once, with a warning that says so.

    Returns:
        int64 ``[N]``. Names become ids in alphabetical order.

    Raises:
        ValueError: If there is not one label per image, or labels are not class ids.
        TypeError: If `dataset` is no labelled dataset, or its labels are not integers or names.

    Example:
        >>> from pairclip import labels_of
        >>> labels_of((["a.png", "b.png", "c.png"], [3, 1, 3]))
        tensor([3, 1, 3])
    """
    return _labelled(source_of(dataset)).labels.clone()


def class_names_of(dataset: Any) -> list[str] | None:
    """Name of each class id of a dataset, or None if it has no names.

    Args:
        dataset: What `LabelledImages` takes.

    Returns:
        The names; name i belongs to class id i.

    Raises:
        ValueError: If datasets that were joined give one class id different names.

    Example:
        >>> from pairclip import class_names_of
        >>> class_names_of((["a.png", "b.png"], ["dog", "cat"]))
        ['cat', 'dog']
    """
    return _labelled(source_of(dataset)).class_names


def _labelled(source: Source, drop_missing: bool = False) -> Source:
    """What has a label, without what is no image of the collection."""
    if not len(source.labels):
        raise ValueError("`dataset` has no images. Check the folder or the filter it is from.")
    left_out = torch.zeros_like(source.labels, dtype=torch.bool)
    if source.system is not None and bool(source.system.any()):
        left_out = source.system
        first = source.path(int(left_out.nonzero()[0, 0]))
        warnings.warn(
            f"{int(left_out.sum()):,} files are hidden or in hidden or system folders and are left "
            f"out, first '{first}'.",
            stacklevel=3,
        )
    missing = (source.labels == MISSING) & ~left_out
    rows = missing.nonzero()[:, 0]
    if len(rows) and not drop_missing:
        raise ValueError(
            f"{len(rows):,} of {len(missing):,} images have no label (None, NaN, an empty name, or "
            f"-1), those at {places(rows)}. Leave them out with "
            "`LabelledImages(dataset, drop_missing=True)`."
        )
    if len(rows):
        warnings.warn(
            f"{len(rows):,} of {len(missing):,} images have no label and are left out, those at "
            f"{places(rows)}.",
            stacklevel=3,
        )
    keep = ~(left_out | missing)
    if bool(keep.all()):
        return source
    if not bool(keep.any()):
        raise ValueError("`dataset` has no image with a label.")
    return View(source.dataset, source, keep.nonzero()[:, 0])


def _readable(source: Source, problems: list[Problem]) -> Source:
    if not problems:
        return source
    if len(problems) == len(source.labels):
        raise ValueError(f"`dataset` has no image that can be read ({in_words(problems)}).")
    warnings.warn(
        f"{len(problems):,} of {len(source.labels):,} images can't be read and are left out "
        f"({in_words(problems)}).",
        stacklevel=3,
    )
    keep = torch.ones_like(source.labels, dtype=torch.bool)
    keep[[problem.index for problem in problems]] = False
    view = View(source.dataset, source, keep.nonzero()[:, 0])
    view.unreadable = [*source.unreadable, *problems]
    return view


def _relabelled(source: Source) -> Source:
    there, labels = source.labels.unique(return_inverse=True)
    names = source.class_names
    classes = labels, None if names is None else [names[id_] for id_ in there.tolist()]
    return View(source.dataset, source, classes=classes)


def _check_some_labels(source: Source) -> None:
    """Raise if one of some items has another label than the dataset tells."""
    sample = np.linspace(0, len(source.labels) - 1, _ITEMS_LOOKED_AT).round().astype(int)
    with random_state_kept():
        for index in np.unique(sample).tolist() if len(source.labels) else ():
            try:
                source.check_label(index)
            except LabelsDiffer:
                raise
            except Exception:
                continue  # said where it is read


def check_images(dataset: Any, *, num_workers: int = 0) -> list[Problem]:
    """Read every image of a dataset once, and list those that can't be read.

    Args:
        dataset: What `LabelledImages` takes, of images.
        num_workers: Processes that read; 0 does it in this one.

    Returns:
        A `~pairclip.datasets.Problem` for each image that can't be read: its place in
        ``LabelledImages(dataset)``, its path where the dataset tells, and the reason.

    Raises:
        TypeError: If the dataset is of cached features.

    Example:
        >>> import numpy as np
        >>> from pairclip import check_images
        >>> images = [np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255.0)]
        >>> for problem in check_images((images, ["cat", "dog"])):
        ...     print(problem.index, problem.reason[:46])
        1 A float image must be in [0, 1], got values fr
    """
    return problems_of(LabelledImages(dataset).source, num_workers=num_workers)
