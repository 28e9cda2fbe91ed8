"""Galleries of queries and the images that they found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pairclip import _checks
from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import class_name, classes_in_turn, file_name, hits, images_of
from pairclip.evaluation.wording import MAKES_EVALUATIONS
from pairclip.plots.drawing import TITLE_SIZE, new_figure, saved, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

_RIGHT = "#00794f"
_WRONG = "#c1272d"
_MOST_LETTERS = 16


def plot_retrieval(
    dataset: Any,
    evaluation: Evaluation,
    *,
    gallery: Any = None,
    queries: int | Sequence[int] = 8,
    k: int = 5,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    r"""Draw queries with the images nearest to them, right and wrong ones marked.

    Those of the query's class have a green frame and a tick, others a red one and a cross. A query
    has its class above it, and the name of its file where the dataset tells.

    Args:
        dataset: The dataset that was evaluated.
        evaluation: Knows the neighbours.
        gallery: The dataset that was searched, if the evaluation has one.
        queries: How many to draw, the classes taking turns, or which: their places in the
            dataset.
        k: Neighbours of each, at most the 10 that the evaluation keeps.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ValueError: If the dataset is another one, or a query or `k` is out of range.
        ImportError: If matplotlib is not installed.
        OSError: If `path` can't be written.

    Example:
        >>> import numpy as np, torch
        >>> from pairclip import evaluate_embeddings
        >>> from pairclip.plots import plot_retrieval
        >>> labels = [0, 0, 1, 1]
        >>> evaluation = evaluate_embeddings(torch.eye(2)[labels], labels)
        >>> images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
        >>> figure = plot_retrieval((images, labels), evaluation, queries=[3], k=2)
        >>> [axes.get_title() for axes in figure.axes]
        ['1', '✓ 1\n1.00', '✗ 0\n0.00']
    """
    _checks.check_is("evaluation", evaluation, Evaluation, MAKES_EVALUATIONS)
    k = _checks.check_positive_int("k", k)
    most = evaluation.neighbors.shape[1]
    if k > most:
        raise ValueError(f"`k` must be at most the {most} neighbours of the evaluation, got {k}.")
    images = images_of(evaluation, dataset, gallery)
    rows = _rows(evaluation, queries)
    named = [file_name(images.queries, int(evaluation.queries[row])) for row in rows]
    cell, between = 1.15, 0.32
    whole_width = cell * (k + 1) + 0.3
    title = wrapped(title, whole_width)
    head = 0.25 + 0.2 * len(title.splitlines()) if title else 0.05
    figure = new_figure(whole_width, (cell + between) * len(rows) + head)
    width, height = figure.get_size_inches()
    for line, (row, (file, file_path)) in enumerate(zip(rows, named, strict=True)):
        bottom = (height - head - (line + 1) * (cell + between) + 0.08) / height

        def place(column: int, bottom: float = bottom) -> Axes:
            left = 0.1 + column * cell + (0.1 if column else 0)
            side = cell - 0.14
            return figure.add_axes((left / width, bottom, side / width, side / height))

        query = int(evaluation.queries[row])
        name = shortened(class_name(evaluation, query), _MOST_LETTERS)
        if file_path is not None:
            name += f"\n{shortened(file, _MOST_LETTERS)}"
        _draw(place(0), images.queries[query][0], name, "black")
        for column, hit in enumerate(hits(evaluation, row, k), 1):
            caption = f"{hit.mark} {shortened(hit.class_name, _MOST_LETTERS - 2)}\n{hit.score:.2f}"
            color = _RIGHT if hit.is_right else _WRONG
            _draw(place(column), images.gallery[hit.image][0], caption, color)
    if title:
        figure.text(
            0.5, 1 - 0.1 / height, title, ha="center", va="top", size=TITLE_SIZE, parse_math=False
        )
    return saved(figure, path)


def _rows(evaluation: Evaluation, queries: int | Sequence[int]) -> list[int]:
    """Rows of `evaluation.queries` to draw."""
    if isinstance(queries, (int, np.integer)):
        _checks.check_positive_int("queries", queries)
        everything = list(range(evaluation.num_queries))
        return classes_in_turn(evaluation.labels[evaluation.queries], everything)[:queries]
    row_of = {int(query): row for row, query in enumerate(evaluation.queries)}
    for query in queries:
        if query not in row_of:
            raise ValueError(
                f"`queries` must be images that were queries, got {query}. Images alone in their "
                "class have nothing to find."
            )
    if not len(queries):
        raise ValueError("`queries` must name at least one image, got none.")
    return [row_of[int(query)] for query in queries]


def _draw(axes: Axes, image: Image.Image, caption: str, color: str) -> None:
    axes.imshow(np.asarray(image))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=color, linewidth=2.5)
    axes.set_title(caption, size=7, color=color, pad=4, parse_math=False)
