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

# Where datasets of torchvision and its likes keep their labels.
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
# What Pillow and the readers behind it raise on a damaged file.
_READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class LabelledImages(Dataset[tuple[Image.Image, int]]):
    """A labelled dataset, opened: RGB images, class ids and names, whatever its kind.

    Args:
        dataset: Anything with ``len()`` and ``[i] -> (image, label)``: a torchvision dataset or
            `ImageFolder`, a `Subset` or `ConcatDataset` of those, a Hugging Face dataset, a pair
            ``(images, labels)``, or your own. Images may be PIL images of any mode, uint8 arrays
            ``[H, W]`` or ``[H, W, 3]``, uint8 tensors ``[3, H, W]``, or float tensors
            ``[3, H, W]`` in ``[0, 1]``, or paths. Labels may be integers or names.

    Attributes:
        labels: Class id of each image, int64 ``[N]``.
        class_names: Name of each class id, or None.

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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB and its class id; an error names the image that can't be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be in [0, {len(self)}), got {index}.")
        try:
            image = as_rgb(_read_image(self.dataset, index))
        except _READ_ERRORS as error:
            path = _path_of(self.dataset, index)
            where = f"Image {index}" + (f" ({path})" if path else "")
            raise ValueError(f"{where} can't be read: {error}") from error
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


def as_rgb(image: Any) -> Image.Image:
    """Turn one image of any kind that `LabelledImages` takes into an RGB image of 8 bits."""
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
        rgb: Image.Image = image.convert("RGB")
        return rgb
    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as opened:
            return as_rgb(opened)
    array = _channels_last(image)
    if not array.size:
        raise ValueError(f"An image must have pixels, got shape {list(array.shape)}.")
    if array.dtype.kind == "f":
        array = _from_unit_range(array)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"An image of integers must be uint8 in [0, 255], got {array.dtype}. Convert it, or "
            "give floats in [0, 1]."
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _channels_last(image: Any) -> npt.NDArray[Any]:
    """An array or tensor as ``[H, W]`` or ``[H, W, C]``."""
    array: npt.NDArray[Any]
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        array = image.float().numpy() if image.is_floating_point() else image.numpy()
        possible_axes = [0]
    elif isinstance(image, np.ndarray):
        array = image
        possible_axes = [2, 0]
    else:
        raise TypeError(
            f"An image must be a PIL image, an array, a tensor or a path, got "
            f"{type(image).__name__}."
        )
    if array.ndim == 2:
        return array
    if array.ndim == 3:
        for axis in possible_axes:
            if array.shape[axis] in (1, 3, 4):
                array = np.moveaxis(array, axis, 2)
                return array[:, :, 0] if array.shape[2] == 1 else array
    raise ValueError(
        "An image must have shape [H, W] or [3, H, W], or [H, W, 3] as an array, got "
        f"{list(array.shape)}."
    )


def _from_unit_range(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    lowest, highest = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"A float image must be in [0, 1], got values from {lowest:g} to {highest:g}. Divide "
            "values in 0..255 by 255, and leave normalisation to the tower."
        )
    return (array * 255 + 0.5).astype(np.uint8)


def _eight_bits(array: npt.NDArray[Any], mode: str) -> npt.NDArray[np.uint8]:
    if mode == "F":
        return _from_unit_range(array)
    # Pillow opens grey images of 16 bits in these modes, and would clip them at 255.
    if array.size and (array.min() < 0 or array.max() > 65535):
        raise ValueError(
            f"An image of mode {mode!r} must be in [0, 65535], got values from {array.min()} to "
            f"{array.max()}."
        )
    deep = mode != "I" or (array.size and array.max() > 255)
    return (array // 257 if deep else array).astype(np.uint8)


def _is_pair(dataset: Any) -> bool:
    return isinstance(dataset, tuple) and len(dataset) == 2


def _labels_and_names(dataset: Any) -> tuple[npt.NDArray[np.int64], list[str] | None]:
    if isinstance(dataset, LabelledImages):
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
    dataset, index = _origin(dataset, index)
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


def _origin(dataset: Any, index: int) -> tuple[Any, int]:
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


def _path_of(dataset: Any, index: int) -> str | None:
    dataset, index = _origin(dataset, index)
    if _is_pair(dataset):
        image = _read_image(dataset, index)
        return str(image) if isinstance(image, (str, os.PathLike)) else None
    for name in ("samples", "imgs", "_image_files", "_images"):
        files = getattr(dataset, name, None)
        if isinstance(files, Sequence) and len(files) > index:
            entry = files[index]
            return str(entry[0] if isinstance(entry, tuple) else entry)
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
