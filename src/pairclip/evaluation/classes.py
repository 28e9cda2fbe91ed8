"""Classes of an evaluation: what they are called, their metrics, and which are confused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from pairclip._vectors import highest
from pairclip.evaluation.histogram import FloatArray, IntArray
from pairclip.similarity import ClassTotals

_MOST_CONFUSED = 5
# Classes that are compared with all at once, which bounds the memory.
_ROWS = 1024


def class_means(values: FloatArray, classes: IntArray, count: int) -> FloatArray:
    """Mean over the queries of each class, NaN where there is none."""
    queries = np.bincount(classes, minlength=count)
    sums = np.bincount(classes, weights=values, minlength=count)
    means: FloatArray = np.divide(sums, queries, out=np.full(count, np.nan), where=queries > 0)
    return means


def names_of(ids: list[int], class_names: list[str] | None) -> list[str]:
    """A name for each class id, no two alike."""
    if class_names is None:
        return [str(class_id) for class_id in ids]
    for class_id in ids:
        if not 0 <= class_id < len(class_names):
            raise ValueError(
                f"`class_names` has {len(class_names)} names, but there is a class id {class_id}. "
                "Give one name for each id from 0 to the highest, or None."
            )
    names = [class_names[class_id] for class_id in ids]
    while len(set(names)) < len(names):
        uses = Counter(names)
        names = [
            name if uses[name] == 1 else f"{name} ({class_id})"
            for name, class_id in zip(names, ids, strict=True)
        ]
    return names


def confused_classes(totals: ClassTotals, names: list[str]) -> list[tuple[str, str, float]]:
    """The most similar pairs of different classes, most similar first."""
    count = len(names)
    values = totals.sums.new_empty(1, 0)
    places = torch.empty(1, 0, dtype=torch.int64, device=values.device)
    for start in range(0, count, _ROWS):
        means = totals.mean_cosines(start, min(start + _ROWS, count))
        pairs = torch.ones_like(means, dtype=torch.bool).triu_(start + 1)
        of_rows, columns = highest(
            means.masked_fill_(~pairs, -torch.inf).flatten()[None], _MOST_CONFUSED
        )
        values, chosen = highest(torch.cat([values, of_rows], dim=1), _MOST_CONFUSED)
        places = torch.cat([places, columns + start * count], dim=1).gather(1, chosen)
    return [
        (names[place // count], names[place % count], value)
        for place, value in zip(places[0].tolist(), values[0].tolist(), strict=True)
        if value > -torch.inf
    ]
