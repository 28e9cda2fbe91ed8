"""The page that answers a query image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from pairclip import _files
from pairclip.report.html import Html, element, page, section
from pairclip.report.thumbnails import data_uri

_SIDE = 192


def write_search_report(
    folder: str | os.PathLike[str],
    query: Image.Image,
    results: Sequence[tuple[Image.Image, str, float]],
    *,
    title: str = "Image search",
    note: str | None = None,
) -> Path:
    """Write a query image and what was found for it as one HTML page that loads nothing.

    Args:
        folder: Where ``search.html`` is written; made if it isn't there.
        query: The image that was searched for.
        results: What was found, best first: image, caption and score of each.
        title: Heading of the page.
        note: A sentence below it.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from pairclip.report import write_search_report
        >>> image = Image.new("RGB", (8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_search_report(folder, image, [(image, "cat.png", 0.9)])
        ...     page.stat().st_size < 30_000
        True
    """
    found = [
        element(
            "li",
            element("figure", _picture(image, caption), _caption(caption, score)),
        )
        for image, caption, score in results
    ]
    content = [
        section("Searched for", _picture(query, "the query image")),
        section("Found", element("ol", *found, class_="results"), intro=_intro(len(found))),
    ]
    path = Path(folder) / "search.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_text(path, page(title, *content, note=note))
    return path


def _intro(count: int) -> str:
    return f"{count:,} images, most similar first, with their cosine." if count else "Nothing."


def _picture(image: Image.Image, text: str) -> Html:
    uri, width, height = data_uri(image, _SIDE)
    return element("img", src=uri, width=width, height=height, alt=text)


def _caption(caption: str, score: float) -> Html:
    return element(
        "figcaption",
        element("span", caption, class_="name", title=caption),
        element("small", f"{score:.3f}"),
    )
