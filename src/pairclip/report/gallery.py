"""Queries and what they found, before and after, by what became of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import (
    EvaluationImages,
    Hit,
    class_name,
    classes_in_turn,
    file_name,
    hits,
    neighbor_is_right,
)
from pairclip.report.html import Html, element
from pairclip.report.thumbnails import Thumbnails

_MOST_QUERIES = 60
_NEIGHBORS = 5
# Of each kind, before the others are folded away.
_OPEN = 4


class _Kind(NamedTuple):
    name: str
    title: str
    rows: npt.NDArray[np.int64]  # of the queries, the most telling ones first
    order: str


def query_gallery(evaluations: dict[str, Evaluation], images: EvaluationImages) -> Html:
    """Some queries of each kind with their nearest images; each image is stored once."""
    after = list(evaluations.values())[-1]
    kinds = _kinds(list(evaluations.values()))
    thumbnails = Thumbnails()
    parts = []
    numbers = _shared_out([len(kind.rows) for kind in kinds], _MOST_QUERIES)
    for kind, number in zip(kinds, numbers, strict=True):
        queries = classes_in_turn(after.labels[after.queries], kind.rows.tolist())[:number]
        cases = [_case(kind, row, evaluations, images, thumbnails) for row in queries]
        parts.append(
            element(
                "section",
                element("h3", kind.title),
                element("p", _how_many(kind, number), class_="intro"),
                element("ul", *cases[:_OPEN], class_="cases") if cases else None,
                _folded(cases[_OPEN:]),
                class_="kind",
                data_kind=kind.name,
            )
        )
    return element(
        "div", thumbnails.stored(), _filters(kinds, after), *parts, class_="gallery", id="gallery"
    )


def _how_many(kind: _Kind, number: int) -> str:
    total = len(kind.rows)
    if number < total:
        return f"{number:,} of {total:,} queries, {kind.order}, the classes in turn."
    return {0: "None.", 1: "1 query."}.get(total, f"{total:,} queries.")


def _folded(cases: list[Html]) -> Html | None:
    if not cases:
        return None
    return element(
        "details",
        element("summary", f"{len(cases)} more"),
        element("ul", *cases, class_="cases"),
    )


def _kinds(evaluations: list[Evaluation]) -> list[_Kind]:
    after = evaluations[-1]
    precision = after.per_query["mean_average_precision"]
    right = neighbor_is_right(after)[:, 0]
    if len(evaluations) == 1:
        return [
            _sorted("wrong", "Nearest image of another class", ~right, precision, "worst first"),
            _sorted("right", "Nearest image of the same class", right, precision, "worst first"),
        ]
    before = evaluations[0]
    was_right = neighbor_is_right(before)[:, 0]
    gain = precision - before.per_query["mean_average_precision"]
    return [
        _sorted(
            "fixed", "Wrong before, right after", right & ~was_right, -gain, "largest gain first"
        ),
        _sorted("new", "Right before, wrong after", ~right & was_right, gain, "largest loss first"),
        _sorted("still", "Wrong before and after", ~right & ~was_right, precision, "worst first"),
    ]


def _sorted(
    name: str,
    title: str,
    chosen: npt.NDArray[np.bool_],
    by: npt.NDArray[np.float64],
    order: str,
) -> _Kind:
    rows = np.flatnonzero(chosen)
    return _Kind(name, title, rows[np.argsort(by[rows], kind="stable")], order)


def _shared_out(wanted: list[int], total: int) -> list[int]:
    """Up to `total` places shared out evenly; what one doesn't want goes to the others."""
    places = [0] * len(wanted)
    for left, i in enumerate(np.argsort(wanted, kind="stable")):
        places[i] = min(wanted[i], (total - sum(places)) // (len(wanted) - left))
    return places


def _case(
    kind: _Kind,
    row: int,
    evaluations: dict[str, Evaluation],
    images: EvaluationImages,
    thumbnails: Thumbnails,
) -> Html:
    some = next(iter(evaluations.values()))
    query = int(some.queries[row])
    name = class_name(some, query)
    rows = [
        element(
            "div",
            element("p", when, class_="when"),
            *(_hit(each, images, thumbnails) for each in hits(evaluation, row, _NEIGHBORS)),
            class_="hits",
        )
        for when, evaluation in evaluations.items()
    ]
    file, path = file_name(images.queries, query)
    picture = thumbnails.show(query, images.queries[query][0], f"query: {name}, {path or file}")
    caption = element(
        "figcaption", name, " ", element("small", file, class_="name", title=path or file)
    )
    return element(
        "li",
        element("figure", picture, caption, class_="query"),
        element("div", *rows, class_="found"),
        data_kind=kind.name,
        data_class=int(some.labels[query]),
    )


def _hit(hit: Hit, images: EvaluationImages, thumbnails: Thumbnails) -> Html:
    word = "right" if hit.is_right else "wrong"
    picture = images.gallery[hit.image][0]
    # Images of a gallery are numbered behind the queries.
    number = hit.image + (0 if images.gallery is images.queries else len(images.queries))
    file, path = file_name(images.gallery, hit.image)
    whole = f"{hit.class_name}, {path or file}"
    return element(
        "figure",
        thumbnails.show(number, picture, f"{word}: {whole}"),
        element(
            "figcaption",
            element("span", f"{hit.mark}\N{NO-BREAK SPACE}{hit.class_name}", class_="name"),
            element("small", f"{hit.score:.2f}"),
            title=whole,
        ),
        class_=f"hit {word}",
    )


def _filters(kinds: list[_Kind], evaluation: Evaluation) -> Html:
    """Choices that the page's script shows and obeys."""
    present = np.unique(evaluation.labels[evaluation.queries]).tolist()
    return element(
        "form",
        _choice("kind", "Show", [(kind.name, kind.title) for kind in kinds if len(kind.rows)]),
        _choice(
            "class", "Class", [(str(place), evaluation.class_names[place]) for place in present]
        ),
        element("output", ""),
        class_="filters",
        hidden="",
    )


def _choice(name: str, label: str, options: list[tuple[str, str]]) -> Html:
    everything = element("option", "all", value="")
    choices = [element("option", text, value=value) for value, text in options]
    return element("label", label, " ", element("select", everything, *choices, name=name))
