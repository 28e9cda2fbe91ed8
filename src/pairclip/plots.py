"""Pictures of similarities and of training (needs matplotlib: ``pip install pairclip[plot]``)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pairclip.datasets import as_rgb
from pairclip.evaluation import Evaluation
from pairclip.finetuner import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour scale for all similarities, so that two pictures can be compared: blue is opposite,
# white unrelated, red alike.
_COLORS = "RdBu_r"
_LIMITS = (-1.0, 1.0)
_TEXT_SIZE = 9.0
_MOST_FIGURES = 30


def plot_similarity_matrix(
    images: Sequence[Any],
    similarity: Tensor | npt.NDArray[Any],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the similarity of some images, with the images on both axes and figures in the cells.

    The colours always run from -1 to 1, so that pictures before and after compare.

    Args:
        images: N images of any kind that `LabelledImages` takes; 4 to 16 are legible.
        similarity: Cosines ``[N, N]``, as from `similarity_matrix`.
        names: A name per image, written under it.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ValueError: If shapes don't fit.
        ImportError: If matplotlib is not installed.

    Example:
        >>> import numpy as np, torch
        >>> from pairclip import plot_similarity_matrix
        >>> images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> figure = plot_similarity_matrix(images, torch.eye(2))
        >>> len(figure.axes)
        6
    """
    count = len(images)
    values = _square("similarity", similarity, count, "images")
    _check_names(names, count)
    cell = 0.8
    left, top, right, bottom = 1.3, 1.0 + (0.45 if title else 0), 1.1, 0.25
    size = cell * count
    figure = _new_figure(left + size + right, top + size + bottom)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, size / width, size / height))
    drawn = _draw_cells(axes, values, digits=2)
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
                _shortened(names[number], 12),
                ha="center",
                va="bottom",
                size=7,
                parse_math=False,
            )
    bar = figure.add_axes(
        ((left + size + 0.2) / width, bottom / height, 0.16 / width, size / height)
    )
    _color_bar(figure, drawn, bar)
    if title:
        figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", size=11, parse_math=False)
    return _saved(figure, path)


def plot_class_similarity(
    evaluation: Evaluation,
    *,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the mean similarity of the images of each two classes.

    The colours always run from -1 to 1, so that pictures before and after compare. Up to 30
    classes have figures in their cells.

    Args:
        evaluation: Holds the class similarities and names.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from pairclip import evaluate_embeddings, plot_class_similarity
        >>> evaluation = evaluate_embeddings(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> figure = plot_class_similarity(evaluation, title="before")
        >>> figure.axes[0].get_title()
        'before'
    """
    values = evaluation.class_similarity
    count = len(values)
    cell = 0.55 if count <= _MOST_FIGURES else 16 / count
    size = max(2.5, cell * count)
    figure = _new_figure(size + 2.6, size + 1.9, layout="compressed")
    axes = figure.add_subplot()
    drawn = _draw_cells(axes, values, digits=2 if count <= _MOST_FIGURES else None)
    if cell >= 0.12:
        names = [_shortened(name, 18) for name in evaluation.class_names]
        text_size = min(_TEXT_SIZE, 60 * cell)
        axes.set_xticks(range(count), names, rotation=90, size=text_size, parse_math=False)
        axes.set_yticks(range(count), names, size=text_size, parse_math=False)
    if title:
        axes.set_title(title, size=11, parse_math=False)
    _color_bar(figure, drawn, None)
    return _saved(figure, path)


def plot_history(
    history: History, *, title: str | None = None, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the loss of each step, and the figures of the evaluations between.

    Args:
        history: What `Finetuner.fit` returned.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ValueError: If the history has no step.
        ImportError: If matplotlib is not installed.

    Example:
        >>> from pairclip import History, plot_history
        >>> history = History(steps=[{"step": 1, "loss": 0.5, "learning_rate": 1e-5}])
        >>> len(plot_history(history).axes)
        2
    """
    if not history.steps:
        raise ValueError("`history` must have at least one step to draw, got none.")
    evaluated = bool(history.evaluations)
    figure = _new_figure(7.5, 7.5 if evaluated else 5.5, layout="constrained")
    rows = figure.subplots(
        3 if evaluated else 2, 1, sharex=True, height_ratios=[3, 3, 1] if evaluated else [3, 1]
    )
    steps = [record["step"] for record in history.steps]
    losses = np.array([record["loss"] for record in history.steps], float)
    many = len(steps) > 50
    rows[0].plot(steps, losses, color="0.7" if many else "C0", linewidth=1, marker=_marker(steps))
    if many:
        window = len(steps) // 25
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        rows[0].plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} steps")
        rows[0].legend(frameon=False)
    rows[0].set_ylabel("loss")
    if evaluated:
        shown = {"recall_at_1": "recall at 1", "mean_average_precision": "mAP", "gap": "gap"}
        at = [record["step"] for record in history.evaluations]
        for key, label in shown.items():
            figures = [record[key] for record in history.evaluations]
            rows[1].plot(at, figures, marker="o", markersize=4, label=label)
        rows[1].set_ylabel("held-out images")
        rows[1].legend(frameon=False)
    rates = [record["learning_rate"] for record in history.steps]
    rows[-1].plot(steps, rates, color="C2", marker=_marker(steps))
    rows[-1].set_ylabel("learning rate")
    rows[-1].set_ylim(bottom=0)
    rows[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rows[-1].set_xlabel("step")
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    if title:
        rows[0].set_title(title, size=11, parse_math=False)
    return _saved(figure, path)


def _new_figure(
    width: float, height: float, layout: Literal["constrained", "compressed"] | None = None
) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed: pip install pairclip[plot]"
        ) from error
    return Figure(figsize=(width, height), dpi=150, layout=layout)


def _draw_cells(axes: Axes, values: npt.NDArray[Any], digits: int | None) -> Any:
    drawn = axes.imshow(values, cmap=_COLORS, vmin=_LIMITS[0], vmax=_LIMITS[1])
    if digits is None:
        return drawn
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        red, green, blue, _ = drawn.cmap(drawn.norm(value))
        # Relative luminance: white figures on dark cells, black on light ones.
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45
        # Adding 0 turns a rounded -0.0 into 0.0.
        text = "-" if np.isnan(value) else f"{round(float(value), digits) + 0.0:.{digits}f}"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            size=_TEXT_SIZE,
            color="white" if dark and not np.isnan(value) else "black",
        )
    return drawn


def _color_bar(figure: Figure, drawn: Any, axes: Axes | None) -> None:
    bar = (
        figure.colorbar(drawn, cax=axes)
        if axes is not None
        else figure.colorbar(drawn, fraction=0.046, pad=0.03)
    )
    bar.set_label("cosine similarity")
    bar.outline.set_visible(False)


def _square(
    name: str, values: Tensor | npt.NDArray[Any], count: int, of_what: str
) -> npt.NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.shape != (count, count):
        raise ValueError(
            f"`{name}` must have shape [{count}, {count}] for {count} {of_what}, got "
            f"{list(array.shape)}."
        )
    return array


def _check_names(names: Sequence[str] | None, count: int) -> None:
    if names is not None and len(names) != count:
        raise ValueError(f"`names` must have one name per image, got {len(names)} for {count}.")


def _shortened(name: str, length: int) -> str:
    name = " ".join(str(name).split())
    return name if len(name) <= length else name[: length - 1] + "…"


def _marker(steps: list[Any]) -> str:
    return "o" if len(steps) == 1 else ""


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path)
    return figure
