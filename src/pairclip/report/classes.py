"""Class by class: heatmaps, metrics, and which classes are confused."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import similarity_order, with_clearest_classes
from pairclip.evaluation.wording import as_text, signed
from pairclip.report.colors import heat_class
from pairclip.report.html import Html, element, header, row, scrolling, table
from pairclip.retrieval import METRICS

_MOST_CLASSES = 40
_MOST_VALUES = 12
_PER_CLASS = ("recall_at_1", "mean_average_precision", "knn_accuracy")


def heatmaps(evaluations: dict[str, Evaluation]) -> Html:
    """Class similarities beside each other: one order, one colour scale."""
    compared = list(evaluations.values())
    places = _classes_to_show(compared)
    clearest = with_clearest_classes(compared)
    similarity = compared[clearest].class_similarity[np.ix_(places, places)]
    order = places[similarity_order(similarity)]
    total = len(compared[0].class_names)
    which = "The classes"
    if len(order) < total:
        which = f"{len(order)} of {total} classes, those with the most similar others,"
    return element(
        "div",
        element(
            "p",
            f"Mean cosine of the images of two classes; on the diagonal, of two images of one "
            f"class. {which} are in an order that puts similar ones next to each other"
            + (f", by their similarity {list(evaluations)[clearest]}" * (len(evaluations) > 1))
            + ". The colours run from -1 to 1.",
            class_="intro",
        ),
        element(
            "div",
            *(_heatmap(when, each, order) for when, each in evaluations.items()),
            class_="beside",
        ),
        element("p", class_="readout", aria_live="polite"),
        _scale(),
        class_="heatmaps",
    )


def confused_classes(evaluations: dict[str, Evaluation]) -> Html:
    """The most similar pairs of classes of each evaluation, with their similarity in all."""
    return element(
        "div",
        *(_confused(when, evaluation, evaluations) for when, evaluation in evaluations.items()),
        class_="beside",
    )


def class_table(before: Evaluation | None, after: Evaluation) -> Html:
    """Metrics of each class; the page's script sorts it by any column."""
    parts = ["value"] if before is None else ["before", "after", "change"]
    images = np.bincount(after.labels, minlength=len(after.class_names))
    head = element(
        "thead",
        element(
            "tr",
            element("td", colspan=2),
            *(
                element("th", METRICS[key].title, scope="colgroup", colspan=len(parts))
                for key in _PER_CLASS
            ),
        ),
        header("class", "images", *(part for _ in _PER_CLASS for part in parts)),
    )
    rows = [
        row(
            name,
            f"{images[place]}",
            *(text for key in _PER_CLASS for text in _class_metrics(before, after, key, place)),
        )
        for place, name in enumerate(after.class_names)
    ]
    return scrolling(
        "Metrics of each class",
        element("table", head, element("tbody", *rows), class_="sortable"),
    )


def _class_metrics(
    before: Evaluation | None, after: Evaluation, key: str, place: int
) -> tuple[str, ...]:
    now = float(after.per_class[key][place])
    if before is None:
        return (as_text(now),)
    was = float(before.per_class[key][place])
    return as_text(was), as_text(now), signed(now - was)


def _classes_to_show(evaluations: list[Evaluation]) -> npt.NDArray[np.int64]:
    """All classes, or of many those that are most similar to another one in any evaluation."""
    closest = np.full(len(evaluations[0].class_names), -np.inf)
    if len(closest) <= _MOST_CLASSES:
        return np.arange(len(closest))
    for evaluation in evaluations:
        apart = evaluation.class_similarity.copy()
        np.fill_diagonal(apart, -np.inf)
        closest = np.maximum(closest, apart.max(axis=1))
    return np.sort(np.argsort(-closest, kind="stable")[:_MOST_CLASSES])


def _heatmap(when: str, evaluation: Evaluation, order: npt.NDArray[np.int64]) -> Html:
    names = [evaluation.class_names[place] for place in order]
    values = evaluation.class_similarity[np.ix_(order, order)]
    head = element(
        "tr",
        element("td"),
        *(element("th", element("span", name), scope="col", title=name) for name in names),
    )
    rows = [
        element(
            "tr",
            element("th", element("span", name), scope="row", title=name),
            *(
                element(
                    "td",
                    as_text(value, 2),
                    class_=heat_class(value),
                    title=f"{name}, {other}: {as_text(value, 2)}",
                )
                for other, value in zip(names, similarities, strict=True)
            ),
        )
        for name, similarities in zip(names, values.tolist(), strict=True)
    ]
    dense = " dense" if len(names) > _MOST_VALUES else ""
    return scrolling(
        f"Class similarities: {when}",
        element(
            "table",
            element("caption", when),
            element("thead", head),
            element("tbody", *rows),
            class_=f"heat{dense}",
            data_when=when,
        ),
    )


def _scale() -> Html:
    ends = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    return element(
        "p",
        "Colours: ",
        *(element("span", f"{end:g}", class_=f"key {heat_class(end)}") for end in ends),
        class_="scale",
    )


def _confused(when: str, evaluation: Evaluation, evaluations: dict[str, Evaluation]) -> Html:
    place_of = {name: place for place, name in enumerate(evaluation.class_names)}
    return table(
        f"Most similar classes: {when}",
        ["classes", *evaluations],
        [
            [
                f"{one}, {other}",
                *(
                    as_text(each.class_similarity[place_of[one], place_of[other]])
                    for each in evaluations.values()
                ),
            ]
            for one, other, _ in evaluation.confused_classes
        ],
    )
