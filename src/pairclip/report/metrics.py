"""The metrics before and after: in words, and as a table."""

from __future__ import annotations

from pairclip.evaluation import Change, Evaluation, wording
from pairclip.evaluation.showing import neighbor_is_right
from pairclip.evaluation.wording import as_text, interval_of, signed
from pairclip.report.html import Html, element, header, joined, row, scrolling
from pairclip.retrieval import METRICS, PAIR_METRICS, QUERY_METRICS

_INTERVAL = (
    "where the change would lie had other queries of the same kind been drawn (paired percentile "
    "bootstrap over queries). It leaves out what another seed of the training, or other images to "
    "search among, would change"
)


def summary(before: Evaluation | None, after: Evaluation, name: str | None = None) -> Html:
    """What the table says, in a few sentences."""
    classes = len(after.class_names)
    images = f"{after.num_images:,} images of {classes:,} class{'es' if classes > 1 else ''}"
    if after.gallery_labels is not None:
        images = (
            f"{after.num_images:,} images, searched for among {len(after.gallery_labels):,} of a "
            f"gallery, together of {classes:,} classes"
        )
    where = f"On {images}" if name is None else f"On “{name}” ({images})"
    if before is None:
        return element(
            "p",
            f"{where}, the nearest image is of the same class for {after.recall_at_1:.1%} of "
            f"{after.num_queries:,} queries; {_similarities(after)}",
        )
    changes = after.changes(before)
    was_right, is_right = (neighbor_is_right(each)[:, 0] for each in (before, after))
    return joined(
        element(
            "p",
            f"{where}, recall at 1 went {_in_words(changes['recall_at_1'])}. Mean average "
            f"precision went {_in_words(changes['mean_average_precision'])}.",
        ),
        element(
            "p",
            f"{int((is_right & ~was_right).sum()):,} of {after.num_queries:,} queries now find an "
            "image of their own class first and did not before; "
            f"{int((was_right & ~is_right).sum()):,} no longer do. Before: "
            f"{_similarities(before)} After: {_similarities(after)}",
        ),
    )


def metrics_table(before: Evaluation | None, after: Evaluation, label: str = "Metrics") -> Html:
    """All metrics, of queries and of pairs, with intervals and marks where there are two."""
    changes = (
        {key: Change(getattr(after, key), getattr(after, key), None) for key in METRICS}
        if before is None
        else after.changes(before)
    )
    columns = ["value"] if before is None else ["before", "after", "change", "95 % interval"]
    head = element("thead", header("Metric", *columns))
    among = "among the others" if after.gallery_labels is None else "in the gallery"
    groups = [
        element(
            "tbody",
            element("tr", element("th", title, scope="rowgroup", colspan=len(columns) + 1)),
            *(
                _row(metric.title, changes[key], before is not None)
                for key, metric in metrics.items()
            ),
        )
        for title, metrics in [
            (f"Search: each image {among}", QUERY_METRICS),
            ("Pairs of images", PAIR_METRICS),
        ]
    ]
    return scrolling(label, element("table", head, *groups, class_="metrics"))


def meanings() -> Html:
    """What each metric means, folded away."""
    entries = {**wording.meanings(), "95 % interval": _INTERVAL}
    terms = [joined(element("dt", term), element("dd", text)) for term, text in entries.items()]
    return element("details", element("summary", "What the metrics mean"), element("dl", *terms))


def _row(title: str, change: Change, compared: bool) -> Html:
    before, after = as_text(change.before), as_text(change.after)
    if not compared:
        return row(title, after)
    return row(title, before, after, change_cell(change), interval_of(change))


def change_cell(change: Change) -> Html:
    """A difference, marked by sign, colour and word where its interval leaves out 0."""
    text = signed(change.difference)
    if not change.is_clear:
        return element("td", text, class_="number")
    kind, sign, word = ("gain", "▲", "gain") if change.difference > 0 else ("loss", "▼", "loss")
    mark = element("span", sign, role="img", aria_label=word)
    return element("td", mark, " ", text, class_=f"number {kind}")


def _in_words(change: Change) -> str:
    span = f"from {as_text(change.before)} to {as_text(change.after)}"
    if change.interval is None:
        return f"{span} ({signed(change.difference)})"
    verdict = "no clear change"
    if change.is_clear:
        verdict = "a clear gain" if change.difference > 0 else "a clear loss"
    return f"{span} ({signed(change.difference)}, 95 % interval {interval_of(change)}: {verdict})"


def _similarities(evaluation: Evaluation) -> str:
    text = f"the mean similarity of two images of one class is {as_text(evaluation.same_mean)}"
    if len(evaluation.class_names) > 1:
        text += f", of two classes {as_text(evaluation.different_mean)}"
    return f"{text}."
