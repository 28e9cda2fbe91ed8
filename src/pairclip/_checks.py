"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_is(name: str, value: object, kind: type, source: str) -> None:
    """Raise a TypeError unless `value` is an instance of `kind`, which `source` makes."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise TypeError(
            f"`{name}` must be {article} {kind.__name__}, got {type(value).__name__}. "
            f"{source} makes one."
        )


def check_positive_int(name: str, value: object) -> int:
    """Return `value` as an int, or raise unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return int(value)


def check_count(name: str, value: object) -> int:
    """Return `value` as an int, or raise unless it is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value}.")
    return int(value)


def check_finite(name: str, embeddings: Tensor, *, first_row: int | None = None) -> None:
    """Raise a ValueError that names the first row with a NaN or an infinity.

    A block of the rows of `name` says with `first_row` where it starts.
    """
    # One NaN or infinity makes the sum non-finite, and a sum needs no mask of the same size;
    # a finite tensor whose sum overflows only takes the slower look below. In pieces: on the CPU
    # a sum in float64 makes a copy first.
    sums = (piece.sum(dtype=torch.float64).item() for piece in embeddings.split(8192))
    if embeddings.numel() == 0 or all(map(math.isfinite, sums)):
        return
    bad = ~torch.isfinite(embeddings).all(dim=1)
    count = int(bad.sum())
    if count:
        start = first_row or 0
        first = start + int(bad.nonzero()[0, 0])
        rows = f"{len(embeddings)} rows"
        if first_row is not None:
            rows = f"the rows {start} to {start + len(embeddings) - 1}"
        raise ValueError(
            f"`{name}` has NaN or infinite values in {count} of {rows}, first in row {first}. "
            "Check the images of these rows and the model that encoded them."
        )


def check_embeddings(name: str, value: Any) -> None:
    """Raise unless `value` is dense floating point ``[N, D]``, D at least 1; no value is read."""
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"`{name}` must be a tensor or a NumPy array, got {type(value).__name__}.")
    if isinstance(value, Tensor):
        _check_dense(name, value)
    if value.ndim != 2:
        raise ValueError(
            f"`{name}` must have shape [N, D], one row per image, got {list(value.shape)}."
        )
    if not (value.is_floating_point() if isinstance(value, Tensor) else value.dtype.kind == "f"):
        raise TypeError(f"`{name}` must be floating point, got {value.dtype}.")
    if value.shape[1] == 0:
        raise ValueError(
            f"`{name}` must have at least one number in each row, got shape {list(value.shape)}."
        )


def _check_dense(name: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise TypeError(
            f"`{name}` must be a dense tensor, got layout {value.layout}. Give `{name}.to_dense()`."
        )
    if value.is_nested or value.is_quantized:
        kind, fix = ("nested", "unbind()") if value.is_nested else ("quantized", "dequantize()")
        raise TypeError(f"`{name}` must be a plain tensor, got a {kind} one. Use `{name}.{fix}`.")
    if value.is_meta:
        raise ValueError(f"`{name}` must have values, got a tensor on the device 'meta'.")


def as_embeddings(name: str, value: Any, *, finite: bool = False) -> Tensor:
    """Return `value` as a floating-point tensor of shape ``[N, D]``, or raise."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(_native(value))
    check_embeddings(name, value)
    embeddings: Tensor = value
    if finite:
        check_finite(name, embeddings.detach())
    return embeddings


def as_labels(name: str, value: Any, *, length: int | None = None) -> Tensor:
    """Return `value` as an int64 tensor of shape ``[N]``, or raise; its values are not read."""
    if not isinstance(value, Tensor):
        value = torch.from_numpy(_native(label_array(name, value)))
    _check_dense(name, value)
    if value.ndim != 1:
        raise ValueError(_not_one_dimensional(name, value.shape))
    if value.is_floating_point() or value.is_complex():
        raise TypeError(_not_integers(name, value.dtype))
    if length is not None and len(value) != length:
        raise ValueError(
            f"`{name}` must have one label per row, got {len(value)} labels for {length} rows."
        )
    labels: Tensor = value.to(torch.int64).contiguous()
    return labels


def label_array(name: str, value: Any) -> npt.NDArray[np.int64]:
    """Return `value` (sequence, array or tensor of integers) as an int64 array of shape ``[N]``."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    array = np.asarray(value)
    if array.ndim == 0:
        raise TypeError(
            f"`{name}` must be a list, an array or a tensor, one class id per item, got "
            f"{type(value).__name__}."
        )
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1:
        raise ValueError(_not_one_dimensional(name, array.shape))
    if array.dtype.kind not in "iub":
        raise TypeError(_not_integers(name, array.dtype))
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"`{name}` must be integers below 2**63, got {int(array.max())}.")
    return array.astype(np.int64, copy=False)


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, copied only if torch can't share its memory as it is."""
    return np.require(array, array.dtype.newbyteorder("="), ["C", "W"])


def _not_one_dimensional(name: str, shape: Collection[int]) -> str:
    if len(shape) == 2 and list(shape)[1] == 1:
        advice = f"Take its column, `{name}[:, 0]`."
    else:
        advice = (
            f"Turn one-hot rows into class ids with `{name}.argmax(1)`; rows with several ones "
            "have no class id."
        )
    return f"`{name}` must have shape [N], one class id per item, got {list(shape)}. {advice}"


def _not_integers(name: str, dtype: object) -> str:
    # Objects, such as members of an Enum, need not be ordered, but their texts are.
    values = f"list(map(str, {name}))" if str(dtype) == "object" else name
    return (
        f"`{name}` must be integers, got {dtype}. Turn names or other values into class ids with "
        f"`numpy.unique({values}, return_inverse=True)[1]`."
    )


def check_number(name: str, value: object) -> None:
    """Raise a TypeError unless `value` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def check_in(interval: str, name: str, value: float, *, advice: str = "") -> None:
    """Raise unless `value` is a number in an interval, such as "[0, 1)" or "(0, inf)"."""
    check_number(name, value)
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"`{name}` must be in {interval}, got {value}. {advice}".rstrip())
