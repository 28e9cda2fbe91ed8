"""Figures of an evaluation: what they are called, how they changed, how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The figures of a table, in its order. Of all in the first group, more is better.
QUERY_TITLES = {
    "recall_at_1": "Recall at 1",
    "recall_at_5": "Recall at 5",
    "recall_at_10": "Recall at 10",
    "precision_at_10": "Precision at 10",
    "r_precision": "R-precision",
    "map_at_r": "MAP@R",
    "mean_average_precision": "Mean average precision",
    "knn_accuracy": "k-nearest-neighbour accuracy",
}
PAIR_TITLES = {
    "same_mean": "Mean similarity, same class",
    "same_std": "Standard deviation, same class",
    "different_mean": "Mean similarity, different classes",
    "different_std": "Standard deviation, different classes",
    "gap": "Gap between the two means",
    "roc_auc": "ROC AUC of pairs",
    "pair_average_precision": "Average precision of pairs",
    "best_threshold": "Best threshold for pairs",
    "balanced_accuracy": "Balanced accuracy at that threshold",
}
TITLES = QUERY_TITLES | PAIR_TITLES


@dataclass(frozen=True)
class Change:
    """One figure before and after.

    Attributes:
        before: The figure of the baseline.
        after: The figure compared with it.
        interval: Ends of the 95 % paired percentile bootstrap interval of the difference, over
            queries; None for a figure of pairs, or of a single query.

    Example:
        >>> from pairclip.evaluation import Change
        >>> change = Change(before=0.5, after=0.75, interval=(0.125, 0.375))
        >>> change.difference, change.is_clear
        (0.25, True)
    """

    before: float
    after: float
    interval: tuple[float, float] | None

    @property
    def difference(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def change_row(title: str, change: Change) -> str:
    """A row of a Markdown table."""
    difference = signed(change.difference)
    if change.is_clear:
        difference = f"**{difference}**"
    interval = ""
    if change.interval is not None:
        interval = " to ".join(map(signed, change.interval))
    return (
        f"| {title} | {shown(change.before)} | {shown(change.after)} | {difference} | {interval} |"
    )


def shown(figure: float) -> str:
    """A figure with three decimals; "-" where it isn't defined."""
    # Adding 0 turns a rounded -0.0 into 0.0.
    return "-" if math.isnan(figure) else f"{round(figure, 3) + 0.0:.3f}"


def signed(difference: float) -> str:
    """A difference with its sign."""
    return "-" if math.isnan(difference) else f"{round(difference, 3) + 0.0:+.3f}"
