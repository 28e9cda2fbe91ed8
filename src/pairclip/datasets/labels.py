"""Labels of any kind as class ids, and class ids of several datasets as those of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pairclip import _checks

# The id of an image without a label. Datasets of torchvision and Hugging Face have it too.
MISSING = -1


def ids_and_names(labels: Any, length: int) -> tuple[Tensor, list[str] | None]:
    """Class ids, int64 ``[N]``, `MISSING` where there is none, and the name of each id.

    Names, in alphabetical order, are those of labels that are strings; of others there are none.
    None, NaN, pandas' NA, an empty name and the number -1 are missing labels.
    """
    array = _one_column(_as_array(labels))
    if array.dtype == object:
        array = _plain(array)
    names: list[str] | None = None
    if array.dtype.kind in "UST":
        strings = _decoded(array) if array.dtype.kind == "S" else array.astype(str)
        missing = strings == ""
        unique, places = np.unique(strings[~missing], return_inverse=True)
        array = np.full(len(strings), MISSING)
        array[~missing] = places
        names = unique.tolist()
    elif array.dtype.kind == "f" and np.isnan(array).any():
        # Integers with a gap become floats in pandas, and through it elsewhere.
        whole = np.where(np.isnan(array), MISSING, array)
        exact = (whole == np.trunc(whole)) & (np.abs(whole) < 2.0**53)
        array = whole.astype(np.int64) if exact.all() else array
    ids = _checks.label_array("labels", array)
    if len(ids) != length:
        raise ValueError(
            f"`labels` must have one label per image, got {len(ids)} labels for {length} images."
        )
    return torch.from_numpy(ids.copy()), names


def _as_array(labels: Any) -> npt.NDArray[Any]:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    if isinstance(labels, (list, tuple)):
        # NumPy would make the string 'nan' of a NaN, and '1' of the 1 in [1, "cat"].
        return np.fromiter(labels, dtype=object, count=len(labels))
    array = np.asarray(labels)
    if not array.ndim:
        raise TypeError(
            "`labels` must be a list, an array or a column with one label per image, got "
            f"{type(labels).__name__}."
        )
    return array


def _decoded(names: npt.NDArray[Any]) -> npt.NDArray[np.str_]:
    """Names that are bytes as text."""
    return np.char.decode(names.astype(bytes), "utf-8", "surrogateescape")


def _one_column(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim == 2:
        _refuse_rows(array)
    return array


def _refuse_rows(rows: npt.NDArray[Any]) -> None:
    """Say what to do with a row of numbers, or of names, per image."""
    shape = f"`labels` must be one class per image, got shape {list(rows.shape)}"
    if rows.dtype.kind not in "iufb":
        raise ValueError(
            f"{shape}, such as {tuple(rows[0].tolist())!r}. Join the parts of a name, for instance "
            "by `['/'.join(parts) for parts in labels]`."
        )
    if rows.size and np.isin(rows, (0, 1)).all() and (rows.sum(axis=1) == 1).all():
        raise ValueError(f"{shape}. Turn one-hot rows into class ids with `labels.argmax(1)`.")
    raise ValueError(
        f"{shape}, and its rows are not one-hot. An image of several classes has no class id: "
        "choose one of them for each image, or train on such rows as targets of "
        "`TargetSimilarityLoss`."
    )


def _plain(objects: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Python objects as an array of integers, floats with NaN, or strings."""
    kinds = set(map(type, objects))
    if kinds == {str}:
        return objects.astype(str)
    if kinds == {int}:
        return _integers(objects)
    missing = np.fromiter(map(is_missing, objects), dtype=bool, count=len(objects))
    kinds = set(map(type, objects[~missing]))
    if not kinds:
        return np.full(len(objects), MISSING)
    if all(issubclass(kind, str) for kind in kinds):
        # The text that it is: an Enum of names would be asked for another, and be cut.
        pairs = zip(objects, missing, strict=True)
        return np.array(["" if gone else str.__str__(name) for name, gone in pairs])
    if all(issubclass(kind, bytes) for kind in kinds):
        return _decoded(np.where(missing, b"", objects))
    if all(issubclass(kind, (int, np.integer, np.bool_)) for kind in kinds):
        return _integers(np.where(missing, MISSING, objects))
    if all(issubclass(kind, (float, np.floating, int, np.integer)) for kind in kinds):
        return np.where(missing, np.nan, objects).astype(np.float64)
    if not missing.any() and all(
        issubclass(kind, (list, tuple, np.ndarray, Tensor)) for kind in kinds
    ):
        try:
            rows = np.array([np.asarray(row) for row in objects])
        except ValueError:
            lengths = sorted({len(row) for row in objects})
            raise ValueError(
                "`labels` must be one class per image, got lists of different lengths, from "
                f"{lengths[0]} to {lengths[-1]}. An image of several classes has no class id: "
                "choose one of them for each image."
            ) from None
        return _one_column(rows)
    types = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(
        f"`labels` must be all integers or all names, got {types}. Make names of all of them, for "
        "instance by `[str(label) for label in labels]`."
    )


def _integers(objects: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    try:
        return objects.astype(np.int64)
    except OverflowError:
        largest = max(objects, key=abs)
        raise ValueError(
            f"`labels` must be integers of 64 bits, got {largest}. Make names of all of them, for "
            "instance by `[str(label) for label in labels]`."
        ) from None


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, pandas' NA, an empty name."""
    if value is None or (isinstance(value, str) and not value):
        return True
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return type(value).__name__ in ("NAType", "NaTType")  # pandas' own


def join_classes(
    *datasets: tuple[Tensor, list[str] | None],
) -> tuple[list[Tensor], list[str] | None]:
    """Class ids of several datasets as ids of one set of classes.

    Ids of datasets with names belong together by name; the first dataset's ids stay as they are,
    and names that it lacks follow. Datasets without names have the same ids for the same classes.

    Args:
        datasets: Labels, int64 ``[N]``, and class names of each.

    Returns:
        The labels of each, and the class names of all, or None.

    Raises:
        ValueError: If only some have names, or several classes of one dataset have the same.

    Example:
        >>> import torch
        >>> from pairclip.datasets import join_classes
        >>> queries = torch.tensor([0, 1]), ["ant", "bee"]
        >>> gallery = torch.tensor([0, 1]), ["bee", "cat"]
        >>> join_classes(queries, gallery)
        ([tensor([0, 1]), tensor([1, 2])], ['ant', 'bee', 'cat'])
    """
    return join_named({f"dataset {number}": each for number, each in enumerate(datasets)})


def join_named(
    datasets: Mapping[str, tuple[Tensor, list[str] | None]],
) -> tuple[list[Tensor], list[str] | None]:
    """`join_classes` of datasets, under what an error calls them."""
    all_names = [names for _, names in datasets.values()]
    if all(names == all_names[0] for names in all_names):
        return [labels for labels, _ in datasets.values()], all_names[0]
    joined: dict[str, int] = {}
    labels_of_all = []
    for what, (labels, names) in datasets.items():
        if names is None:
            raise ValueError(
                f"Classes are joined by name, and {what} has none. Ids of different datasets need "
                "not mean the same, so give names as labels in all of them, for instance "
                "`(images, [names[label] for label in labels])`."
            )
        new = [joined.setdefault(name, len(joined)) for name in names]
        if len({*new}) < len(new):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"Classes are joined by name, and {what} has several that are called {twice!r}."
            )
        # The last, -1, stays what it is.
        labels_of_all.append(torch.tensor([*new, MISSING], device="cpu")[labels])
    return labels_of_all, list(joined)


def places(rows: Sequence[int] | Tensor, *, most: int = 8) -> str:
    """Some row numbers for a message, and how many more there are."""
    first = ", ".join(str(int(row)) for row in rows[:most])
    return first + (f" and {len(rows) - most:,} more" if len(rows) > most else "")
