"""One image of any kind as an RGB image of eight bits."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor


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
    made = Image.fromarray(np.ascontiguousarray(array))
    return made if made.mode == "RGB" else made.convert("RGB")


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
                array = array if axis == 2 else np.moveaxis(array, axis, 2)
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
