"""HTML in which text can't become markup, and the page around it."""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from pairclip import __version__, _files
from pairclip.report.colors import heat_styles


class Html(str):
    """Markup. Any other string is text, which `element` escapes."""


def element(tag: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """An HTML or SVG element.

    Args:
        tag: Name of the element.
        children: `Html` as it is, text escaped, None left out.
        attributes: Escaped; None leaves one out. ``class_`` is ``class``, ``data_kind``
            ``data-kind``.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{tag}{written}>"
    return Html(start if tag in {"meta", "img"} else f"{start}{joined(*children)}</{tag}>")


def joined(*children: str | None) -> Html:
    """Children behind each other, text among them escaped."""
    return Html(
        "".join(
            child if isinstance(child, Html) else _escaped(child)
            for child in children
            if child is not None
        )
    )


def section(title: str, *children: str | None, intro: str | None = None) -> Html:
    """A part of the page under its heading."""
    lead = element("p", intro, class_="intro") if intro else None
    return element("section", element("h2", title), lead, *children)


def scrolling(label: str, *children: str | None) -> Html:
    """A box that scrolls by itself, by keyboard too, so that the page doesn't have to."""
    return element("div", *children, class_="scroll", tabindex=0, role="region", aria_label=label)


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table of names in its first column, and numbers."""
    return scrolling(
        caption,
        element(
            "table",
            element("caption", caption),
            element("thead", header(*columns)),
            element("tbody", *(row(*texts) for texts in rows)),
        ),
    )


def header(name: str, *columns: str) -> Html:
    """The row of a table's head: over names, and over each column of numbers."""
    numbers = (element("th", text, scope="col", class_="number") for text in columns)
    return element("tr", element("th", name, scope="col"), *numbers)


def row(name: str, *cells: str) -> Html:
    """A row of a table: its name, and numbers, or cells that are elements already."""
    return element(
        "tr",
        element("th", name, scope="row"),
        *(
            cell if isinstance(cell, Html) else element("td", cell, class_="number")
            for cell in cells
        ),
    )


def page(title: str, *content: str | None, note: str | None = None) -> str:
    """The whole page. It may load nothing, and run no script but its own."""
    style = _resource("page.css") + heat_styles()
    script = _resource("page.js")
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element(
            "header", element("h1", title), element("p", note, class_="note") if note else None
        ),
        element("main", *content),
        element("footer", f"Written by pairclip {__version__}."),
        element("script", Html(script)),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def write_page(
    folder: str | os.PathLike[str],
    name: str,
    title: str,
    *content: str | None,
    note: str | None = None,
) -> Path:
    """Write the whole page into a folder, made if it isn't there; its path."""
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_text(path, page(title, *content, note=note))
    return path


def _escaped(text: str) -> str:
    # Lone surrogates, which undecodable file names have, are not UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"
