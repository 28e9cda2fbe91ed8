"""Any labelled image dataset as images and class ids; labels without decoding an image."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from tqdm import tqdm

from pairclip import _checks
from pairclip._pixels import as_rgb as as_rgb

# Where datasets of torchvision and its likes keep their labels.
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
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
        labels, self.class_names = _labels_and_names(dataset)
        if not len(labels):
            raise ValueError("`dataset` has no images. Check the folder or the filter it is from.")
        self.labels = torch.from_numpy(labels.copy())
        self.dataset: Any = dataset.dataset if isinstance(dataset, LabelledImages) else dataset
        self.of_features = _of_features(self.dataset)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The image in RGB and its class id; an error names the image that can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}.")
        if self.of_features:
            features, label = self.dataset[index]
            return features, label
        try:
            image = as_rgb(_read_image(self.dataset, index))
        except _READ_ERRORS as error:
            path = path_of(self.dataset, index)
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
    return torch.from_numpy(_labels_and_names(dataset)[0].copy())


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
    return _labels_and_names(dataset)[1]


def _of_features(dataset: Any) -> bool:
    if isinstance(dataset, Subset) and _is_view(dataset):
        return _of_features(dataset.dataset)
    if isinstance(dataset, ConcatDataset) and _is_view(dataset):
        kinds = {_of_features(part) for part in dataset.datasets}
        if len(kinds) > 1:
            raise ValueError(
                "The joined datasets are images and cached features. Join one kind, for instance "
                "by `cache_features` of the images too."
            )
        return kinds.pop()
    return getattr(dataset, "of_features", False) is True


def in_memory(dataset: Any) -> bool:
    """Whether its images are an array or a tensor, so that reading one draws nothing at random."""
    if isinstance(dataset, Subset) and _is_view(dataset):
        return in_memory(dataset.dataset)
    if isinstance(dataset, ConcatDataset) and _is_view(dataset):
        return all(map(in_memory, dataset.datasets))
    return _is_pair(dataset) and type(dataset[0]) in (np.ndarray, Tensor)


def _is_pair(dataset: Any) -> bool:
    return isinstance(dataset, tuple) and len(dataset) == 2


def _labels_and_names(dataset: Any) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    if getattr(dataset, "of_features", None) is not None:  # `LabelledImages`, `CachedFeatures`
        return dataset.labels.numpy(), dataset.class_names
    if isinstance(dataset, Subset) and _is_view(dataset):
        labels, names = _labels_and_names(dataset.dataset)
        return labels[np.asarray(dataset.indices, dtype=np.int64)], names
    if isinstance(dataset, ConcatDataset) and _is_view(dataset):
        return _joined([_labels_and_names(part) for part in dataset.datasets])
    if _is_pair(dataset):
        return _ids_and_names(dataset[1], len(dataset[0]))
    if _hf_columns(dataset) is not None:
        return _hf_labels(dataset)
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"`dataset` must be one dataset, got several under {list(dataset)}. Choose one, for "
            "instance `dataset['train']`."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"`dataset` must have len() and [i] -> (image, label), got {type(dataset).__name__}."
        )
    labels = _told_labels(dataset)
    ids, names = _ids_and_names(
        _labels_by_reading(dataset) if labels is None else labels, len(dataset)
    )
    given = getattr(dataset, "classes", None)
    if names is None and isinstance(given, (list, tuple)) and not _target_transform(dataset):
        names = [str(name) for name in given]
    return ids, names


def _told_labels(dataset: Any) -> Any:
    """The labels that a dataset holds, as its items have them, or None."""
    for name in _LABEL_ATTRIBUTES:
        labels = getattr(dataset, name, None)
        if labels is not None and not callable(labels):
            transform = _target_transform(dataset)
            return labels if transform is None else [transform(label) for label in labels]
    return None


def _target_transform(dataset: Any) -> Any:
    return getattr(dataset, "target_transform", None)


def _ids_and_names(labels: Any, length: int) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    array = np.asarray(labels)
    names: list[str] | None = None
    if array.ndim == 1 and (array.dtype.kind in "UST" or _all_strings(array)):
        unique, array = np.unique(array.astype(str), return_inverse=True)
        names = unique.tolist()
    ids = _checks.label_array("labels", array)
    if len(ids) != length:
        raise ValueError(
            f"`labels` must have one label per image, got {len(ids)} labels for {length} images."
        )
    return ids, names


def _all_strings(array: npt.NDArray[Any]) -> bool:
    return array.dtype == object and all(isinstance(label, str) for label in array)


def _joined(
    parts: list[tuple[npt.NDArray[np.int64], list[str] | None]],
) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    all_names = [names for _, names in parts]
    if any(names != all_names[0] for names in all_names):
        raise ValueError(
            f"The joined datasets give their class ids different names: {all_names}. Join "
            "datasets with the same classes."
        )
    return np.concatenate([labels for labels, _ in parts]), all_names[0]


def _labels_by_reading(dataset: Any) -> list[Any]:
    warnings.warn(
        f"{type(dataset).__name__} does not tell its labels, so all its {len(dataset)} images "
        "are read once to find them. Give it a `targets` attribute to avoid that.",
        stacklevel=2,
    )
    return [
        _item(dataset, index)[1]
        for index in tqdm(range(len(dataset)), desc="Reading labels", disable=None)
    ]


def _item(dataset: Any, index: int) -> tuple[Any, Any]:
    item = dataset[index]
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise TypeError(
            f"`dataset[{index}]` must be a pair (image, label), got {type(item).__name__}."
        )
    return item[0], item[1]


def _read_image(dataset: Any, index: int) -> Any:
    dataset, index = origin_of(dataset, index)
    if _is_pair(dataset):
        images = dataset[0]
        # A pandas column is read by place, as its labels are, not by the labels of its index.
        return images.iloc[index] if hasattr(images, "iloc") else images[index]
    columns = _hf_columns(dataset)
    return _item(dataset, index)[0] if columns is None else dataset[index][columns[0]]


def _is_view(dataset: Any) -> bool:
    """Whether it shows items of other datasets as they are; a subclass may change them."""
    return any(
        isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__
        for kind in (Subset, ConcatDataset)
    )


def origin_of(dataset: Any, index: int) -> tuple[Any, int]:
    """The dataset behind subsets and joins that an item comes from, and its index there."""
    while _is_view(dataset):
        if isinstance(dataset, Subset):
            dataset, index = dataset.dataset, int(dataset.indices[index])
            index += len(dataset) if index < 0 else 0
        else:
            ends = dataset.cumulative_sizes
            part = int(np.searchsorted(ends, index, side="right"))
            dataset, index = dataset.datasets[part], index - (ends[part - 1] if part else 0)
    return dataset, index


def path_of(dataset: Any, index: int) -> str | None:
    """The file that an image is read from, where the dataset tells."""
    dataset, index = origin_of(dataset, index)
    if _is_pair(dataset):
        image = _read_image(dataset, index)
        return str(image) if isinstance(image, (str, os.PathLike)) else None
    for name in ("samples", "imgs", "_image_files", "_images"):
        files = getattr(dataset, name, None)
        if isinstance(files, Sequence) and len(files) > index:
            entry = files[index][0] if isinstance(files[index], tuple) else files[index]
            if isinstance(entry, (str, os.PathLike)):
                return str(entry)
    return None


def _hf_columns(dataset: Any) -> tuple[str, str] | None:
    """Image and label column of a Hugging Face dataset, or None for another kind."""
    features = getattr(dataset, "features", None)
    if not (isinstance(features, Mapping) and hasattr(dataset, "with_format")):
        return None
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    named = [name for name in ("label", "labels") if name in kinds]
    labels = [name for name in named if name in labels] or labels or named
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"A Hugging Face dataset must have one image and one label column, got {kinds}. "
            "Select them with `dataset.select_columns([...])`, and rename the label to 'label'."
        )
    return images[0], labels[0]


def _hf_labels(dataset: Any) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    columns = _hf_columns(dataset)
    column = columns[1] if columns else ""
    labels = dataset.select_columns([column]).with_format("numpy")[:][column]
    ids, names = _ids_and_names(labels, len(dataset))
    return ids, getattr(dataset.features[column], "names", None) or names
