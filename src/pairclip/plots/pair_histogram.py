"""Histograms of the similarities of pairs."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from pairclip import _checks
from pairclip.evaluation import Evaluation
from pairclip.evaluation.showing import pair_densities, pair_range
from pairclip.evaluation.wording import MAKES_EVALUATIONS
from pairclip.plots.drawing import (
    DIFFERENT_COLOR,
    SAME_COLOR,
    TITLE_SIZE,
    new_figure,
    saved,
    wrapped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_pair_histogram(
    before: Evaluation,
    after: Evaluation | None = None,
    *,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw how similar the pairs of one class and of different classes are.

    Each kind of pair is drawn as a density, so that the many pairs of different classes don't
    hide the few of one class, in bins that are the wider the fewer pairs there are. Both panels
    have the same axes.

    Args:
        before: The evaluation to draw.
        after: Drawn below `before`, if there are two to compare.
        title: Written above.
        path: File to save the picture to; its ending is the format.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If `path` can't be written.

    Example:
        >>> import torch
        >>> from pairclip import evaluate_embeddings
        >>> from pairclip.plots import plot_pair_histogram
        >>> before = evaluate_embeddings(torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> len(plot_pair_histogram(before, before).axes)
        2
    """
    _checks.check_is("before", before, Evaluation, MAKES_EVALUATIONS)
    if after is not None:
        _checks.check_is("after", after, Evaluation, MAKES_EVALUATIONS)
    evaluations = {"before": before} if after is None else {"before": before, "after": after}
    figure = new_figure(7.5, 2.2 + 2.3 * len(evaluations), layout="constrained")
    panels = figure.subplots(len(evaluations), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (when, evaluation) in zip(panels, evaluations.items(), strict=True):
        _draw(axes, evaluation)
        if after is not None:
            axes.set_title(when, loc="left", size=10)
    low, high = pair_range(*evaluations.values())
    panels[0].set_xlim(low, high)
    panels[0].set_ylim(bottom=0)
    panels[-1].set_xlabel("cosine similarity of two images")
    if title:
        figure.suptitle(wrapped(title, 7.5), size=TITLE_SIZE, parse_math=False)
    return saved(figure, path)


def _draw(axes: Axes, evaluation: Evaluation) -> None:
    densities = pair_densities(evaluation)
    for kind, label, color, line in [
        ("same", "same class", SAME_COLOR, "-"),
        ("different", "different classes", DIFFERENT_COLOR, "--"),
    ]:
        if kind in densities:
            edges, heights = densities[kind]
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.25)
            axes.stairs(heights, edges, color=color, linewidth=1.4, linestyle=line, label=label)
    threshold = evaluation.best_threshold
    if not math.isnan(threshold):
        label = f"best threshold {threshold:.2f}".replace("-", "\N{MINUS SIGN}")
        axes.axvline(threshold, color="0.25", linewidth=1, linestyle=":", label=label)
    # Above the panel, where no peak is.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)
    axes.set_ylabel("density of pairs")
    axes.spines[["top", "right"]].set_visible(False)
