"""Encoded images: files and bytes, within bounds of what decoding them may take."""

from __future__ import annotations

import io
import os
import stat

from PIL import Image, UnidentifiedImageError

# 120 megapixels take 0.5 GB as RGB; a file of a few kilobytes can claim more.
_MOST_PIXELS = 120_000_000
# Resizing the shorter side of an image to 384 pixels, as towers do, makes 38 million of such a one.
_MOST_TIMES_LONGER = 256


def open_image(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """The image in a file, or in what such a file holds; not decoded yet."""
    if isinstance(source, bytes):
        try:
            return Image.open(io.BytesIO(source))
        except UnidentifiedImageError:  # with an address in memory, so another one each time
            raise ValueError(f"cannot identify image file in {len(source):,} bytes.") from None
    # Opening a pipe would wait for its writer for ever.
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError(f"'{os.fspath(source)}' is not a regular file.")
    return Image.open(source)


def check_size(width: int, height: int) -> None:
    """Raise unless an image of this size can be decoded and resized in bounded memory."""
    if not width or not height:
        raise ValueError(f"An image must have pixels, got {width} x {height}.")
    if width * height > _MOST_PIXELS:
        raise ValueError(
            f"An image of {width:,} x {height:,} pixels would take too much memory: the bound is "
            f"{_MOST_PIXELS:,} pixels. Make it smaller; JPEG can be read with `draft_decode=True`."
        )
    if max(width, height) > _MOST_TIMES_LONGER * min(width, height):
        raise ValueError(
            f"An image of {width:,} x {height:,} pixels would take too much memory when its "
            f"shorter side is resized: the longer may be {_MOST_TIMES_LONGER} times as long. Crop "
            "it."
        )
