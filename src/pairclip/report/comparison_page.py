"""The page that shows what fine-tuning changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pairclip import _checks
from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import images_of
from pairclip.evaluation.wording import MAKES_EVALUATIONS
from pairclip.finetuner import History
from pairclip.report.alike import alike_images
from pairclip.report.charts import pair_histograms, training
from pairclip.report.classes import class_table, confused_classes, heatmaps
from pairclip.report.gallery import query_gallery
from pairclip.report.html import Html, element, section, write_page
from pairclip.report.metrics import meanings, metrics_table, summary
from pairclip.towers import VisionTower

_QUERIES = (
    "Each query with the images nearest to it and their cosine. A green frame and ✓ mark those of "
    "its class, a dashed red one and ✗ the others."
)
_PAIRS = (
    "How similar two images are, over all pairs. The less the two shapes overlap, the better the "
    "classes are kept apart. Each shape has area 1, though most pairs are of different classes."
)


def write_report(
    folder: str | os.PathLike[str],
    before: Evaluation | None,
    after: Evaluation,
    *,
    dataset: Any = None,
    gallery: Any = None,
    tower: VisionTower | None = None,
    history: History | None = None,
    title: str | None = None,
    note: str | None = None,
) -> Path:
    """Write what an evaluation shows, or two of them side by side, as one HTML page.

    The page is a single file that loads nothing, for light and dark screens, wide and narrow: the
    metrics with their intervals, heatmaps of the classes, histograms of the pairs, metrics of
    each class, and the images that queries found, right and wrong.

    Args:
        folder: Where ``report.html`` is written; made if it isn't there.
        before: The evaluation to compare with; None shows `after` alone.
        after: The evaluation to show.
        dataset: The dataset that was evaluated, for the images; without it there are no pictures.
        gallery: The dataset that was searched, if the evaluation has one.
        tower: That of `after`. With it the page shows which parts of two images make them similar,
            for the most confused classes (`occlusion_saliency`, some hundred embeddings).
        history: Of the training between.
        title: Heading of the page.
        note: A sentence below it, on what the images and the tower are, for instance.

    Returns:
        Path of the page.

    Raises:
        ValueError: If the evaluations are of other images, `dataset` or `gallery` is another one,
            or there is a `gallery` or a `tower` without a `dataset`.
        OSError: If the page can't be written; an earlier one is then as it was.

    Example:
        >>> import tempfile, torch
        >>> from pairclip import evaluate_embeddings
        >>> from pairclip.report import write_report
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> before = evaluate_embeddings(torch.eye(4), labels)
        >>> after = evaluate_embeddings(torch.eye(2)[labels], labels)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_report(folder, before, after)
        ...     text = page.read_text(encoding="utf-8")
        >>> page.name, "http" in text.replace("http-equiv", "")
        ('report.html', False)
    """
    _checks.check_is("after", after, Evaluation, MAKES_EVALUATIONS)
    if before is not None:
        _checks.check_is("before", before, Evaluation, MAKES_EVALUATIONS)
    if history is not None:
        _checks.check_is("history", history, History, "`Finetuner.fit`")
    if before is None:
        evaluations, heading = {"evaluation": after}, "Evaluation"
    else:
        evaluations, heading = {"before": before, "after": after}, "Before and after fine-tuning"
    for name, given in (("gallery", gallery), ("tower", tower)):
        if given is not None and dataset is None:
            raise ValueError(f"`{name}` would be ignored: give the `dataset` of the evaluation.")
    images = None if dataset is None else images_of(after, dataset, gallery)
    content = [
        section("In short", *_summaries(before, after)),
        None
        if images is None
        else section("What queries found", query_gallery(evaluations, images), intro=_QUERIES),
        section("Metrics", metrics_table(before, after), meanings()),
        section("Further images", *_also_tables(before, after)) if after.also else None,
        section("Similarity of classes", heatmaps(evaluations), confused_classes(evaluations)),
        None if images is None or tower is None else alike_images(after, images, tower),
        section("Similarity of pairs", pair_histograms(evaluations), intro=_PAIRS),
        section("Class by class", class_table(before, after)),
        section("Training", training(history)) if history is not None and history.steps else None,
    ]
    return write_page(folder, "report.html", title or heading, *content, note=note)


def _summaries(before: Evaluation | None, after: Evaluation) -> list[Html]:
    return [
        summary(before, after),
        *(summary(_also(before, name), other, name) for name, other in after.also.items()),
    ]


def _also(before: Evaluation | None, name: str) -> Evaluation | None:
    return None if before is None else before.also[name]


def _also_tables(before: Evaluation | None, after: Evaluation) -> list[Html]:
    return [
        element(
            "details",
            element("summary", f"Metrics of “{name}”"),
            metrics_table(_also(before, name), other, f"Metrics of {name}"),
        )
        for name, other in after.also.items()
    ]
