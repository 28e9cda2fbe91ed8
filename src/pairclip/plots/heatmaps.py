"""Heatmaps: similarities of images and of classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pairclip import _checks
from pairclip.datasets import as_rgb
from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import similarity_order
from pairclip.evaluation.wording import MAKES_EVALUATIONS, as_text
from pairclip.plots.drawing import TITLE_SIZE, new_figure, saved, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour scale for all similarities, so that two pictures can be compared: blue is opposite,
# white unrelated, red alike.
_COLORS = "RdBu_r"
_LIMITS = (-1.0, 1.0)
_TEXT_SIZE = 9.0
_MOST_VALUES = 30


def plot_similarity_matrix(
    images: Sequence[Any],
    similarity: Tensor | npt.NDArray[Any],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the similarity of some images, with the images on both axes and values in the cells.

    The colours always run from -1 to 1, so that pictures before and after compare.

    Args:
        images: N images of any kind that `LabelledImages` takes; 4 to 16 are legible.
        similarity: Cosines ``[N, N]``, as from `similarity_matrix`.
        names: A name per image, such as its class, written above it.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ValueError: If shapes don't fit, there is no image, or `similarity` are no cosines.
        TypeError: If `similarity` is no matrix, or `names` one text.
        ImportError: If matplotlib is not installed.
        OSError: If `path` can't be written.

    Example:
        >>> import numpy as np, torch
        >>> from pairclip import plot_similarity_matrix
        >>> images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> figure = plot_similarity_matrix(images, torch.eye(2))
        >>> len(figure.axes)
        6
    """
    count = len(images)
    if not count:
        raise ValueError("`images` must have at least one image to draw, got none.")
    values = _square(similarity, count)
    if isinstance(names, str):
        raise TypeError(f"`names` must be a list of names, got {names!r}.")
    if names is not None and len(names) != count:
        raise ValueError(f"`names` must have one name per image, got {len(names)} for {count}.")
    cell = 0.8
    size = cell * count
    left, right, bottom = 1.3, 1.1, 0.25
    title = wrapped(title, left + size + right)
    top = 1.0 + (0.25 + 0.2 * len(title.splitlines()) if title else 0)
    figure = new_figure(left + size + right, top + size + bottom)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, size / width, size / height))
    cells = _draw_cells(axes, values, written=True)
    axes.set_xticks([])
    axes.set_yticks([])
    for number, image in enumerate(images):
        picture = np.asarray(as_rgb(image))
        side = cell * 0.86
        across = left + number * cell + (cell - side) / 2
        down = bottom + (count - 1 - number) * cell + (cell - side) / 2
        for x, y in ((across, bottom + size + 0.06), (left - 0.06 - side, down)):
            thumbnail = figure.add_axes((x / width, y / height, side / width, side / height))
            thumbnail.imshow(picture)
            thumbnail.axis("off")
        if names is not None:
            figure.text(
                (across + side / 2) / width,
                (bottom + size + 0.12 + side) / height,
                shortened(names[number], 12),
                ha="center",
                va="bottom",
                size=7,
                parse_math=False,
            )
    bar = figure.add_axes(
        ((left + size + 0.2) / width, bottom / height, 0.16 / width, size / height)
    )
    _color_bar(figure, cells, cax=bar)
    if title:
        figure.text(
            0.5, 1 - 0.1 / height, title, ha="center", va="top", size=TITLE_SIZE, parse_math=False
        )
    return saved(figure, path)


def plot_class_similarity(
    evaluation: Evaluation,
    *,
    order: Literal["similarity", "given"] | Evaluation = "similarity",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the mean similarity of the images of each two classes.

    The colours always run from -1 to 1, so that pictures before and after compare. Up to 30
    classes have values in their cells.

    Args:
        evaluation: Holds the class similarities and names.
        order: ``"similarity"`` has like classes stand together, in the order of an average
            linkage dendrogram of ``1 - similarity``; ``"given"`` leaves them as they are. Another
            evaluation of the same classes lends the order that it has by similarity: pass the one
            from before, and two pictures compare.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ValueError: If `order` is unknown, or of an evaluation of other classes.
        ImportError: If matplotlib is not installed.
        OSError: If `path` can't be written.

    References:
        Bar-Joseph, Gifford and Jaakkola 2001, "Fast optimal leaf ordering for hierarchical
        clustering", for which way the branches turn.

    Example:
        >>> import torch
        >>> from pairclip import evaluate_embeddings, plot_class_similarity
        >>> evaluation = evaluate_embeddings(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> figure = plot_class_similarity(evaluation, title="before")
        >>> figure.axes[0].get_title()
        'before'
    """
    _checks.check_is("evaluation", evaluation, Evaluation, MAKES_EVALUATIONS)
    places = _order(evaluation, order)
    values = evaluation.class_similarity[np.ix_(places, places)]
    count = len(values)
    cell = 0.55 if count <= _MOST_VALUES else 16 / count
    size = max(2.5, cell * count)
    figure = new_figure(size + 2.6, size + 1.9, layout="compressed")
    axes = figure.add_subplot()
    cells = _draw_cells(axes, values, written=count <= _MOST_VALUES)
    if cell >= 0.12:
        names = [shortened(evaluation.class_names[place], 18) for place in places]
        text_size = min(_TEXT_SIZE, 60 * cell)
        axes.set_xticks(range(count), names, rotation=90, size=text_size, parse_math=False)
        axes.set_yticks(range(count), names, size=text_size, parse_math=False)
    if title:
        axes.set_title(wrapped(title, size + 1), size=TITLE_SIZE, parse_math=False)
    _color_bar(figure, cells, fraction=0.046, pad=0.03)
    return saved(figure, path)


def _order(
    evaluation: Evaluation, order: Literal["similarity", "given"] | Evaluation
) -> npt.NDArray[np.int64]:
    if isinstance(order, Evaluation):
        if order.class_names != evaluation.class_names:
            raise ValueError(
                "`order` must be an evaluation of the same classes, got "
                f"{len(order.class_names)} classes for {len(evaluation.class_names)}, or other "
                "names."
            )
        return similarity_order(order.class_similarity)
    _checks.check_choice("order", order, ("similarity", "given"))
    if order == "given":
        return np.arange(len(evaluation.class_names))
    return similarity_order(evaluation.class_similarity)


def _draw_cells(axes: Axes, values: npt.NDArray[Any], *, written: bool) -> Any:
    cells = axes.imshow(values, cmap=_COLORS, vmin=_LIMITS[0], vmax=_LIMITS[1])
    if not written:
        return cells
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        red, green, blue, _ = cells.cmap(cells.norm(value))
        text = as_text(value, 2)
        if value < 0:  # as the colour bar has it; a value that isn't defined stays a dash
            text = text.replace("-", "\N{MINUS SIGN}")
        # Relative luminance: white values on dark cells, black on light ones.
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            size=_TEXT_SIZE,
            color="white" if dark and not np.isnan(value) else "black",
        )
    return cells


def _color_bar(figure: Figure, cells: Any, **place: Any) -> None:
    bar = figure.colorbar(cells, **place)
    bar.set_label("cosine similarity")
    bar.outline.set_visible(False)


def _square(values: Tensor | npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    values = values.detach().cpu().double() if isinstance(values, Tensor) else values
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`similarity` must be a matrix of numbers, got {type(values).__name__}: {error}. "
            "`similarity_matrix` makes one of embeddings."
        ) from error
    if array.shape != (count, count):
        raise ValueError(
            f"`similarity` must have shape [{count}, {count}] for {count} images, got "
            f"{list(array.shape)}."
        )
    if (np.abs(array) > 1.01).any():  # rounding in half precision is no fault
        raise ValueError(
            f"`similarity` must be cosines, in [-1, 1], got {np.nanmin(array):.4g} to "
            f"{np.nanmax(array):.4g}. `similarity_matrix` makes them of embeddings."
        )
    return array
