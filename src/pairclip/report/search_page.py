"""The page that answers query images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

from pairclip.report.html import Html, element, section, write_page
from pairclip.report.thumbnails import picture

_SIDE = 192


class Result(NamedTuple):
    """An image that was found: how it looks, what is written below it, and its file."""

    image: Image.Image
    caption: str
    score: float
    path: str | None = None


class Search(NamedTuple):
    """A query image and what was found for it, best first."""

    query: Image.Image
    results: Sequence[Result]
    path: str | None = None


def write_search_report(
    folder: str | os.PathLike[str],
    query: Image.Image,
    results: Sequence[tuple[Image.Image, str, float]],
    *,
    query_path: str | os.PathLike[str] | None = None,
    paths: Sequence[str | os.PathLike[str] | None] | None = None,
    title: str = "Image search",
    note: str | None = None,
) -> Path:
    """Write a query image and what was found for it as one HTML page that loads nothing.

    Args:
        folder: Where ``search.html`` is written; made if it isn't there.
        query: The image that was searched for.
        results: What was found, best first: image, caption and score of each.
        query_path: File of the query, shown and linked.
        paths: File of each result, linked from its picture; None or a missing list links nothing.
        title: Heading of the page.
        note: A sentence below it, on the tower and the collection, for instance.

    Returns:
        Path of the page.

    Raises:
        ValueError: If there is not one path per result.
        OSError: If the page can't be written; an earlier one is then as it was.

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
    if paths is not None and len(paths) != len(results):
        raise ValueError(
            f"`paths` must have one path per result, got {len(paths)} for {len(results)}."
        )
    files = [None] * len(results) if paths is None else list(map(_text, paths))
    entries = [Result(*result, path) for result, path in zip(results, files, strict=True)]
    search = Search(query, entries, _text(query_path))
    return write_searches(folder, [search], title=title, note=note)


def write_searches(
    folder: str | os.PathLike[str],
    searches: Sequence[Search],
    *,
    title: str = "Image search",
    note: str | None = None,
) -> Path:
    """Write several queries and what was found for each as ``search.html``."""
    content = [
        part for search in searches for part in _parts(search, Path(os.path.realpath(folder)))
    ]
    return write_page(folder, "search.html", title, *content, note=note)


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _parts(search: Search, folder: Path) -> tuple[Html, Html]:
    count = len(search.results)
    intro = f"{count:,} images, most similar first, with their cosine." if count else "Nothing."
    items = [
        element(
            "li",
            element(
                "figure",
                _linked(picture(result.image, _SIDE, result.caption), result.path, folder),
                element(
                    "figcaption",
                    element("span", result.caption, class_="name", title=result.caption),
                    element("small", f"{result.score:.3f}"),
                ),
            ),
        )
        for result in search.results
    ]
    query = _linked(picture(search.query, _SIDE, "the query image"), search.path, folder)
    where = None if search.path is None else element("p", search.path, class_="intro")
    return (
        section("Searched for", element("figure", query, class_="searched"), where),
        section("Found", element("ol", *items, class_="results"), intro=intro),
    )


def _linked(image: Html, path: str | None, folder: Path) -> Html:
    """The image as a link to its file, relative to the page, so that both can move together."""
    if path is None:
        return image
    try:
        target = os.path.relpath(Path(path).resolve(), folder)
    except ValueError:  # another drive
        return element("a", image, href=Path(path).resolve().as_uri())
    address = "/".join(quote(os.fsencode(part), safe="") for part in Path(target).parts)
    return element("a", image, href=address)
