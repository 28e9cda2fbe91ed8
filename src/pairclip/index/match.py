"""What a search answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Match:
    """An image that a search found.

    Attributes:
        score: Cosine of its embedding and the query's.
        index: Its place in the index: in the dataset that it was built from, as long as nothing
            was removed.
        path: Its file, as the dataset gave it, or None.
        label: Its class id, or None if the index has no labels.
        class_name: Name of its class, or None.

    Example:
        >>> from pairclip import Match
        >>> Match(0.93, 3, "photos/cat/03.jpg", 1, "cat").class_name
        'cat'
    """

    score: float
    index: int
    path: str | None
    label: int | None
    class_name: str | None


def matches_of(
    scores: Tensor,
    indices: Tensor,
    lookup: Callable[[int], tuple[str | None, int | None]],
    class_names: list[str] | None,
    min_score: float | None,
) -> list[list[Match]]:
    """The matches of each query: an index of -1 stands for none; `lookup` gives path and label."""
    names = class_names or []

    def match(score: float, index: int) -> Match:
        path, label = lookup(index)
        named = label is not None and 0 <= label < len(names)
        return Match(score, index, path, label, names[label or 0] if named else None)

    return [
        [
            match(score, index)
            for score, index in zip(*of_query, strict=True)
            if index >= 0 and (min_score is None or score >= min_score)
        ]
        for of_query in zip(scores.tolist(), indices.tolist(), strict=True)
    ]
