"""One image of any kind as a person sees it: upright, on white, RGB of eight bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from torch import Tensor

from pairclip.datasets.notices import say_at_once
from pairclip.datasets.reading import check_size, open_image

# What may be said about an image: a kind, of which a dataset says one, and the words.
Say = Callable[[str, str], None]
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow keeps what an orientation may be in; without them there is none to parse.
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_OVERSHOOT = 0.1 + 1e-6  # 0.1 in float32 is a little more


def as_rgb(
    image: Any, *, shorter_side: int | None = None, say: Say = say_at_once, copy: bool = True
) -> Image.Image:
    """Turn one image of any kind that `LabelledImages` takes into an RGB image of 8 bits.

    The orientation in its EXIF data is applied, transparency shows a white ground, and grey of
    sixteen bits is scaled by the bits that it holds.

    Args:
        image: A path, an encoded image as bytes, a PIL image, an array or a tensor.
        shorter_side: Decode JPEG at a fraction of its size that leaves at least so many pixels.
        say: Takes a kind of remark and its words, where an image is not what it should be.
        copy: False where a PIL image may be given back, and changed, since it is nobody else's.

    Returns:
        A new image.

    Raises:
        ValueError: If values or size are out of range.
        TypeError: If it is no image.

    Example:
        >>> import numpy as np
        >>> from pairclip.datasets import as_rgb
        >>> image = as_rgb(np.full((4, 6), 0.5))
        >>> image.mode, image.size, image.getpixel((0, 0))
        ('RGB', (6, 4), (128, 128, 128))
    """
    if isinstance(image, (str, os.PathLike, bytes)):
        with open_image(image) as picture:
            if shorter_side is not None:
                picture.draft(None, (shorter_side, shorter_side))
            return _as_seen(picture, say, copy=False)
    if isinstance(image, Image.Image):
        if type(image) is Image.Image and not image.info and image.mode in ("RGB", "L"):
            check_size(*image.size)  # in memory, and with nothing else to tell
            if image.mode == "L":
                return image.convert("RGB")
            return image.copy() if copy else image  # faster than to convert it
        return _as_seen(image, say, copy=copy)
    array = _channels_last(image)
    if not array.size:
        raise ValueError(f"An image must have pixels, got shape {list(array.shape)}.")
    if array.dtype.kind == "f":
        array = _from_unit_range(array, say)
    elif array.dtype != np.uint8:
        raise ValueError(
            f"An image of integers must be uint8 in [0, 255], got {array.dtype}. Convert it, or "
            "give floats in [0, 1]."
        )
    check_size(array.shape[1], array.shape[0])
    made = Image.fromarray(np.ascontiguousarray(array))
    return made if made.mode == "RGB" else _as_seen(made, say, copy=False)


def _as_seen(image: Image.Image, say: Say, *, copy: bool) -> Image.Image:
    check_size(*image.size)
    deep_colors = _has_deep_colors(image)
    image.load()
    # The file of a TIFF, which may tell its orientation, is closed with the image.
    upright = _UPRIGHT.get(_orientation(image, say))
    if deep_colors:
        _say_dark(image, say)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        rgb = _eight_bits(image, say)
    elif image.has_transparency_data:
        rgb = _on_white(image)
    else:
        rgb = image
    if rgb.mode != "RGB" or (copy and rgb is image):
        rgb = rgb.convert("RGB")
    if upright is not None:
        rgb = rgb.transpose(upright)
    rgb.info = {}  # else who sees this image next would turn it again
    return rgb


def _orientation(image: Image.Image, say: Say) -> int:
    if not any(key in image.info for key in _EXIF):
        return 1  # Pillow itself turns a TIFF
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # Pillow's parser raises whatever a damaged file leads it into
        say(
            "exif",
            f"EXIF data can't be read ({error}), so the image is taken as it lies. If it should be "
            "upright otherwise, save it anew.",
        )
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=alpha)
    return white


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


def _from_unit_range(array: npt.NDArray[Any], say: Say) -> npt.NDArray[np.uint8]:
    lowest, highest = float(array.min()), float(array.max())
    if not (lowest >= -_OVERSHOOT and highest <= 1 + _OVERSHOOT):
        raise ValueError(
            f"A float image must be in [0, 1], got values from {lowest:g} to {highest:g}. Divide "
            "values in 0..255 by 255, and leave normalisation to the tower."
        )
    if lowest < 0 or highest > 1:
        say(
            "overshoot",
            f"A float image has values from {lowest:g} to {highest:g}, as resizing or noise leave "
            "them: they are clipped to [0, 1].",
        )
        array = array.clip(0, 1)
    return (array * 255 + 0.5).astype(np.uint8)


def _eight_bits(image: Image.Image, say: Say) -> Image.Image:
    """Grey of more than eight bits, which Pillow would clip at 255."""
    array = np.asarray(image)
    if image.mode == "F":
        return Image.fromarray(_from_unit_range(array, say))
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0 or highest > 65535:
        raise ValueError(
            f"An image of mode {image.mode!r} must be in [0, 65535], got values from {lowest} to "
            f"{highest}."
        )
    bits, full = next((n, 2**n - 1) for n in (8, 12, 16) if highest < 2**n)
    if bits < 16 and highest:
        say(
            "depth",
            f"A grey image of 16 bits has values from {lowest} to {highest} and is taken to hold "
            f"{bits} bits, since it would come out nearly black otherwise. Where that is wrong, "
            "save such images with 8 bits, scaled as you mean them.",
        )
    # From sixteen bits the upper byte of v / 257 is v // 257 exactly.
    scaled = array // 257 if bits == 16 else (array.astype(np.int32) * 255 + full // 2) // full
    scaled = scaled.astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled[array == key] = 255
    return Image.fromarray(scaled)


def _has_deep_colors(image: Image.Image) -> bool:
    """Whether its file has colours of sixteen bits, of which Pillow reads the upper eight."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and image.mode in (
        "RGB",
        "RGBA",
        "LA",
    )


def _say_dark(image: Image.Image, say: Say) -> None:
    extrema: Any = image.getextrema()
    highest = max(high for _, high in extrema[: 1 if image.mode == "LA" else 3])
    if highest < 16:
        say(
            "depth",
            "An image with colours of 16 bits holds no more than 12 bits "
            f"(at most {256 * highest + 255}), and comes out nearly black. Save such images with 8 "
            "bits per colour, scaled as you mean them.",
        )
