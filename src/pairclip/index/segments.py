"""The rows of an index in pieces: what was added together stays together, in memory and on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pairclip._files import MappedTensors
from pairclip.similarity import nearest_neighbors

# Rows searched at once, which bounds the memory of a step.
ROWS = 65536
# Rows compared at once; more would leave the processor's cache, which costs a few queries most.
_BLOCK = 2048


@dataclass
class Segment:
    """Images that were added together.

    Attributes:
        rows: Their unit embeddings ``[n, D]``.
        labels: Their class ids, int64 ``[n]``, or None.
        paths: Their files, or None.
        mapped: The file that the rows are mapped from, if they are.
        entry: What the header of the saved index says of its file, once it is saved.
        left: Numbers of the rows that were not removed, int64, ascending; None for all.
    """

    rows: Tensor
    labels: Tensor | None
    paths: list[str | None] | None
    mapped: MappedTensors | None = None
    entry: dict[str, Any] | None = None
    left: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.left is None else len(self.left)

    def kept(self, values: Tensor) -> Tensor:
        """Of values for each row, those of the rows that are left."""
        return values if self.left is None else values[self.left]

    def kept_paths(self) -> list[str | None]:
        """Path of each row that is left."""
        if self.paths is None:
            return [None] * len(self)
        if self.left is None:
            return self.paths
        return [self.paths[row] for row in self.left.tolist()]

    def details(self, place: int) -> tuple[str | None, int | None]:
        """Path and class id of one of the rows that are left."""
        row = place if self.left is None else int(self.left[place])
        label = None if self.labels is None else int(self.labels[row])
        return None if self.paths is None else self.paths[row], label

    def remove(self, places: Tensor) -> None:
        """Remove rows, by their places among those that are left."""
        stay = torch.ones(len(self), dtype=torch.bool)
        stay[places] = False
        self.left = stay.nonzero()[:, 0] if self.left is None else self.left[stay]

    def nearest(
        self, queries: Tensor, k: int, wanted: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Scores, and places among the rows that are left, of the nearest in each piece of rows.

        With `wanted`, class ids, only images of these classes are looked at.
        """
        places = numbers = self.left
        if self.left is not None:
            places = torch.arange(len(self.left))
        if wanted is not None and self.labels is not None:
            places = torch.isin(self.kept(self.labels), wanted).nonzero()[:, 0]
            numbers = places if self.left is None else self.left[places]
        found = []
        for start in range(0, len(self) if places is None else len(places), ROWS):
            piece = slice(start, start + ROWS)
            rows = self.rows[piece] if numbers is None else self.rows[numbers[piece]]
            scores, its_rows = nearest_neighbors(
                queries, rows, min(k, len(rows)), block_size=_BLOCK
            )
            found.append((scores, its_rows + start if places is None else places[piece][its_rows]))
            if self.mapped is not None:
                span = piece if numbers is None else _span(numbers[piece])
                self.mapped.release(self.rows[span])
        return found


def labels_of(segments: Sequence[Segment]) -> Tensor | None:
    """Class id of each image of all segments, or None."""
    labels = [s.kept(s.labels) for s in segments if s.labels is not None]
    return torch.cat(labels) if labels else None


def paths_of(segments: Sequence[Segment]) -> list[str | None] | None:
    """Path of each image of all segments, or None where none has one."""
    if all(segment.paths is None for segment in segments):
        return None
    return [path for segment in segments for path in segment.kept_paths()]


def _span(numbers: Tensor) -> slice:
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def nearest(
    segments: Sequence[Segment], queries: Tensor, k: int, wanted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k nearest of all segments: scores, descending, and places in the index."""
    scores = torch.zeros(len(queries), 0)
    indices = torch.zeros(len(queries), 0, dtype=torch.int64)
    first = 0
    # Scores of bfloat16 under somebody's autocast would not be cosines of what is stored.
    with torch.autocast("cpu", enabled=False):
        for segment in segments:
            for its_scores, places in segment.nearest(queries, k, wanted):
                # Stable, so that of equal scores the first image is kept.
                scores, order = torch.cat([scores, its_scores], dim=1).sort(
                    dim=1, descending=True, stable=True
                )
                indices = torch.cat([indices, places + first], dim=1).gather(1, order)
                scores, indices = scores[:, :k], indices[:, :k]
            first += len(segment)
    return scores, indices
