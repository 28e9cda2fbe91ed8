"""Any labelled image dataset, opened."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pairclip.datasets.kinds import source_of
from pairclip.datasets.rgb import as_rgb

# What Pillow, torchvision and the readers behind them raise on a damaged file, and `as_rgb` on
# what is no image.
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    TypeError,
    Image.DecompressionBombError,
)


class LabelledImages(Dataset[tuple[Any, int]]):
    """A labelled dataset, opened: RGB images, class ids and names, whatever its kind.

    Args:
        dataset: Anything with ``len()`` and ``[i] -> (image, label)``: a torchvision dataset or
            `ImageFolder`, a `Subset` or `ConcatDataset` of those, a Hugging Face dataset, a pair
            ``(images, labels)``, or your own. Images may be PIL images of any mode, uint8 arrays
            ``[H, W]`` or ``[H, W, 3]``, uint8 tensors ``[3, H, W]``, or float tensors
            ``[3, H, W]`` in ``[0, 1]``, or paths. Labels may be integers or names. Or
            `CachedFeatures`, or a `Subset` or `ConcatDataset` of them.

    Attributes:
        labels: Class id of each image, int64 ``[N]``.
        class_names: Name of each class id, or None.
        of_features: Whether the items are features of `cache_features`, for the head of a split
            tower, and not images: as they are, of one image ``[T, H]``.

    Raises:
        ValueError: If the dataset is empty, or its labels don't fit its images.
        TypeError: If it is no labelled dataset.

    Example:
        >>> import numpy as np
        >>> from pairclip import LabelledImages
        >>> images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> data = LabelledImages((images, ["dog", "cat"]))
        >>> data.labels, data.class_names, data[0][0].size
        (tensor([1, 0]), ['cat', 'dog'], (8, 8))
    """

    def __init__(self, dataset: Any) -> None:
        self.source = source_of(dataset)
        self.labels, self.class_names = self.source.labels, self.source.class_names
        if not len(self.labels):
            raise ValueError("`dataset` has no images. Check the folder or the filter it is from.")
        self.dataset: Any = self.source.dataset
        self.of_features = self.source.of_features

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image in RGB and its class id; an error names the image that can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}.")
        if self.of_features:
            return self.source.image(index), int(self.labels[index])
        try:
            image = as_rgb(self.source.image(index))
        except _READ_ERRORS as error:
            path = self.source.path(index)
            where = f"Image {index}" + (f" ({path})" if path else "")
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{where} can't be read: {error}") from error
        return image, int(self.labels[index])


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
    return source_of(dataset).labels.clone()


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
    return source_of(dataset).class_names
