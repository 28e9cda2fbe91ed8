"""A picture of training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from pairclip import _checks
from pairclip.evaluation.showing import TRACKED
from pairclip.finetuner import History
from pairclip.plots.drawing import TITLE_SIZE, new_figure, saved, wrapped
from pairclip.retrieval import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_history(
    history: History, *, title: str | None = None, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the loss of each step, and the metrics of the evaluations between.

    Args:
        history: What `Finetuner.fit` returned.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ValueError: If the history has no step.
        ImportError: If matplotlib is not installed.
        OSError: If `path` can't be written.

    Example:
        >>> from pairclip import History, plot_history
        >>> history = History(steps=[{"step": 1, "loss": 0.5, "learning_rate": 1e-5}])
        >>> len(plot_history(history).axes)
        2
    """
    _checks.check_is("history", history, History, "`Finetuner.fit`")
    if not history.steps:
        raise ValueError("`history` must have at least one step to draw, got none.")
    evaluated = bool(history.evaluations)
    figure = new_figure(7.5, 7.5 if evaluated else 5.5, layout="constrained")
    rows = figure.subplots(
        3 if evaluated else 2, 1, sharex=True, height_ratios=[3, 3, 1] if evaluated else [3, 1]
    )
    steps = [record["step"] for record in history.steps]
    losses = np.array([record["loss"] for record in history.steps], float)
    many = len(steps) > 50
    style = {"color": "0.7", "label": "each step"} if many else {"color": "C0"}
    rows[0].plot(steps, losses, linewidth=1, marker=_marker(steps), **style)
    if many:
        # Odd, so that the mean stands at the step in its middle.
        window = len(steps) // 25 // 2 * 2 + 1
        smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        middles = steps[window // 2 : len(steps) - window // 2]
        rows[0].plot(middles, smooth, color="C0", label=f"mean of {window} steps around it")
        rows[0].legend(frameon=False)
    rows[0].set_ylabel("loss")
    if evaluated:
        at = [record["step"] for record in history.evaluations]
        for key in TRACKED:
            values = [record[key] for record in history.evaluations]
            rows[1].plot(at, values, marker="o", markersize=4, label=METRICS[key].title)
        rows[1].set_ylabel("held-out images")
        rows[1].legend(frameon=False)
    rates = np.array([record.get("learning_rate") for record in history.steps], float)
    rows[-1].plot(steps, rates, color="C2", marker=_marker(steps))
    rows[-1].set_ylabel("learning rate")
    rows[-1].set_ylim(bottom=0)
    rows[-1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rows[-1].set_xlabel("step")
    rows[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
    if title:
        rows[0].set_title(wrapped(title, 6.5), size=TITLE_SIZE, parse_math=False)
    return saved(figure, path)


def _marker(steps: list[Any]) -> str:
    return "o" if len(steps) == 1 else ""
