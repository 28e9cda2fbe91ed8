"""Images as data in the page, each of them once."""

from __future__ import annotations

import base64
import io

from PIL import Image

from pairclip.datasets import as_rgb
from pairclip.report.html import Html, element


def data_uri(image: Image.Image, side: int) -> tuple[str, int, int]:
    """A small copy of an image as a data URI, with its width and height, at most `side`."""
    small = as_rgb(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    files = {kind: io.BytesIO() for kind in ("jpeg", "png")}
    for kind, file in files.items():
        small.save(file, kind, quality=82, optimize=True)
    # A drawing or a tiny image is smaller, and sharp, as PNG; a photograph as JPEG.
    kind = min(files, key=lambda kind: len(files[kind].getvalue()))
    data = base64.b64encode(files[kind].getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{data}", *small.size


def picture(image: Image.Image, side: int, text: str) -> Html:
    """A small copy of an image, and what it says to those who don't see it."""
    uri, width, height = data_uri(image, side)
    return element("img", src=uri, width=width, height=height, alt=text)


class Thumbnails:
    """Images that are shown in several places and stored in one."""

    def __init__(self, side: int = 96) -> None:
        self.side = side
        self._stored: dict[int, Html] = {}

    def show(self, number: int, image: Image.Image, text: str) -> Html:
        """A place in which the image is seen.

        Args:
            number: Names the image; the first of a number is the one that is stored.
            image: The image.
            text: Says what is seen, to those who don't see it.
        """
        name = f"i{number}"
        if number not in self._stored:
            uri, width, height = data_uri(image, self.side)
            self._stored[number] = element(
                "symbol",
                element("image", href=uri, width=width, height=height),
                id=name,
                viewBox=f"0 0 {width} {height}",
            )
        return element(
            "svg", element("use", href=f"#{name}"), role="img", aria_label=text, class_="thumb"
        )

    def stored(self) -> Html:
        """The images themselves, to be put into the page once."""
        return element("svg", *self._stored.values(), class_="stored", aria_hidden="true")
