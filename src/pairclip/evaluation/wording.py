"""Metrics and their changes as text."""

from __future__ import annotations

import math

from pairclip.evaluation.comparison import Change
from pairclip.retrieval import METRICS

# What an error about another thing in place of an evaluation recommends.
MAKES_EVALUATIONS = "`evaluate` or `evaluate_embeddings`"


def change_row(title: str, change: Change) -> str:
    """A row of a Markdown table."""
    before, after = as_text(change.before), as_text(change.after)
    return f"| {title} | {before} | {after} | {difference_of(change)} | {interval_of(change)} |"


def difference_of(change: Change) -> str:
    """Its difference in Markdown, in bold if its interval leaves out 0."""
    return f"**{signed(change.difference)}**" if change.is_clear else signed(change.difference)


def interval_of(change: Change) -> str:
    """The ends of its interval; empty where it has none."""
    return "" if change.interval is None else " to ".join(map(signed, change.interval))


def as_text(value: float | None, digits: int = 3) -> str:
    """A metric with that many decimals; "-" where it isn't defined."""
    if value is None or math.isnan(value):
        return "-"
    # Adding 0 turns a rounded -0.0 into 0.0.
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def signed(difference: float) -> str:
    """A difference with its sign."""
    return "-" if math.isnan(difference) else f"{round(difference, 3) + 0.0:+.3f}"


def meanings() -> dict[str, str]:
    """What each metric means, under its title; those that mean the same share an entry."""
    titles: dict[str, list[str]] = {}
    for metric in METRICS.values():
        titles.setdefault(metric.meaning, []).append(metric.title)
    return {"; ".join(several): meaning for meaning, several in titles.items()}
