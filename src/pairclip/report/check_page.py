"""The page that shows what should be looked at in a collection."""

from __future__ import annotations

import os
from pathlib import Path

from pairclip import _checks
from pairclip.collection import Check, Finding
from pairclip.report.html import Html, element, section, table, write_page
from pairclip.report.thumbnails import Thumbnails

_MOST = 40
_WORDS = {
    "Images that can't be read": "Left out of the clean table; a training would stop at them.",
    "The same image in different classes": "At most one of the labels is right. Left out of the "
    "clean table altogether.",
    "The same image in train and test": "It would be evaluated on what it was trained on. The "
    "clean table has the last one alone.",
    "Copies within a part": "They count twice, and find each other. The clean table has the first "
    "one alone.",
    "Labels that may be wrong": "Each image is predicted from all others by the tower's "
    "embeddings. The number says how much better the other class fits: above 0 it does, and about "
    "1 is as clear as it gets. Look at them: some are right, and only unusual.",
    "Classes of one image": "They can't be searched for, nor form a pair of one class.",
    "Classes of nearly the same name": "Perhaps one class, in two folders.",
    "Images of unusual modes": "They are converted to RGB. Look whether they look right.",
}
_MOST_CLASSES = 60


def write_check_report(
    folder: str | os.PathLike[str],
    check: Check,
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

    Raises:
        OSError: If the page can't be written; an earlier one is then as it was.

    Example:
        >>> import numpy as np, tempfile
        >>> from pairclip import check_collection
        >>> from pairclip.report import write_check_report
        >>> images = np.zeros((2, 20, 20, 3), dtype=np.uint8)
        >>> check = check_collection({"all": (images, ["cat", "dog"])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_check_report(folder, check)
        ...     "Images of one colour: 2" in page.read_text(encoding="utf-8")
        True
    """
    _checks.check_is("check", check, Check, "`check_collection`")
    thumbnails = Thumbnails()
    kinds = [_kind(kind, findings, check, thumbnails) for kind, findings in check.findings.items()]
    content = [section("In short", _counts(check)), *kinds, thumbnails.stored()]
    return write_page(folder, "check.html", title, *content, note=note)


def _counts(check: Check) -> Html:
    classes = check.counts()
    names = sorted({name for counts in classes.values() for name in counts})
    first = names[:_MOST_CLASSES]
    title = "Images of each class"
    if len(names) > len(first):
        title += f", the first {len(first)} of {len(names):,}"
    kinds = [[kind, f"{len(findings):,}"] for kind, findings in check.findings.items()]
    return element(
        "div",
        element(
            "div",
            table("To look at", ["kind", "number"], kinds or [["nothing", "0"]]),
            element("p", check.looks()),
        ),
        table(
            title,
            ["class", *classes],
            [[name, *(f"{of.get(name, 0):,}" for of in classes.values())] for name in first],
        ),
        class_="beside",
    )


def _kind(title: str, findings: list[Finding], check: Check, thumbnails: Thumbnails) -> Html:
    words = [_WORDS[title]] if title in _WORDS else []
    if len(findings) > _MOST:
        words.append(f"Here are {_MOST} of {len(findings):,}.")
    rows = [
        element(
            "li",
            element("p", finding.detail, class_="when"),
            *(_picture(check, place, thumbnails) for place in finding.items[:6]),
        )
        for finding in findings[:_MOST]
    ]
    return section(
        f"{title}: {len(findings):,}",
        element("ul", *rows, class_="problems"),
        intro=" ".join(words) or None,
    )


def _picture(check: Check, place: int, thumbnails: Thumbnails) -> Html:
    item = check.items[place]
    if item.problem is not None:
        return element("figure", element("figcaption", item.name))
    name = os.path.basename(item.name)
    caption = element("figcaption", element("span", name, class_="name", title=item.name))
    text = f"{item.class_name}: {item.name}"
    picture = thumbnails.show(place, check.image(place), text)
    where = item.class_name if len(check.parts) == 1 else f"{item.class_name}, {item.part}"
    return element("figure", picture, caption, element("figcaption", where))
