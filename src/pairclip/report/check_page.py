"""The page that shows what should be looked at in a collection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from pairclip import _files
from pairclip.report.html import Html, element, page, section, table
from pairclip.report.thumbnails import Thumbnails

_MOST = 40
_MOST_CLASSES = 60


class Checked(Protocol):
    """What the page needs to know; `pairclip check` finds it."""

    items: list[Any]
    problems: dict[str, list[Any]]

    def image(self, place: int) -> Image.Image:
        """The image of an item."""

    def to_dict(self) -> dict[str, Any]:
        """Counts and lists."""


def write_check_report(
    folder: str | os.PathLike[str],
    check: Checked,
    *,
    title: str = "What is in the collection",
    note: str | None = None,
) -> Path:
    """Write ``check.html``: counts, and each kind of problem with its images.

    Args:
        folder: Where; made if it isn't there.
        check: What was found.
        title: Heading of the page.
        note: A sentence below it.

    Returns:
        Path of the page.
    """
    thumbnails = Thumbnails()
    problems = [_problems(kind, found, check, thumbnails) for kind, found in check.problems.items()]
    content = [section("In short", _counts(check)), *problems, thumbnails.stored()]
    path = Path(folder) / "check.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_text(path, page(title, *content, note=note))
    return path


def _counts(check: Checked) -> Html:
    classes = check.to_dict()["classes"]
    names = sorted({name for counts in classes.values() for name in counts})
    shown = names[:_MOST_CLASSES]
    title = "Images of each class"
    if len(names) > len(shown):
        title += f", the first {len(shown)} of {len(names):,}"
    kinds = [[kind, f"{len(found):,}"] for kind, found in check.problems.items()]
    return element(
        "div",
        table("To look at", ["kind", "number"], kinds or [["nothing", "0"]]),
        table(
            title,
            ["class", *classes],
            [[name, *(f"{of.get(name, 0):,}" for of in classes.values())] for name in shown],
        ),
        class_="beside",
    )


def _problems(title: str, found: list[Any], check: Checked, thumbnails: Thumbnails) -> Html:
    more = f"{_MOST} of {len(found):,}. check.json has all." if len(found) > _MOST else None
    rows = [
        element(
            "li",
            element("p", problem.detail, class_="when"),
            *(_picture(check, place, thumbnails) for place in problem.items[:6]),
        )
        for problem in found[:_MOST]
    ]
    return section(f"{title}: {len(found):,}", element("ul", *rows, class_="problems"), intro=more)


def _picture(check: Checked, place: int, thumbnails: Thumbnails) -> Html:
    item = check.items[place]
    caption = element("figcaption", element("span", item.name, class_="path", title=item.name))
    if item.problem is not None:
        return element("figure", caption)
    text = f"{item.class_name}: {item.name}"
    picture = thumbnails.show(place, check.image(place), text)
    return element(
        "figure", picture, caption, element("figcaption", f"{item.class_name}, {item.part}")
    )
