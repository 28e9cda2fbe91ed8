"""The rows of an index in pieces: what was added together stays together, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pairclip import _checks
from pairclip._files import MappedTensors, bytes_of
from pairclip._vectors import highest, products, row_norms, unit_rows

# Rows compared at once; more would leave the processor's cache, which costs a few queries most.
_BLOCK = 2048
# Rows searched at once, which bounds the memory of a step.
ROWS = 32 * _BLOCK
_QUERIES = 1024  # compared with them at once


class StoredPaths(Sequence[str | None]):
    """Paths as JSON in a file whose checksum was right: all read when the first is asked for."""

    def __init__(self, text: Tensor, count: int, file: Path) -> None:
        self._text = text
        self._count = count
        self._file = file

    @cached_property
    def _all(self) -> list[str | None]:
        try:
            paths: Any = json.loads(bytes(bytes_of(self._text)))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{self._file}' is damaged: {error}.") from error
        return checked_paths(paths, self._count, self._file)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str | None]:
        return iter(self._all)

    def __getitem__(self, place: Any) -> Any:
        return self._all[place]


def checked_paths(paths: Any, count: int, file: Path) -> list[str | None]:
    """What was read from a file, if it is a path or None for each image; else a ValueError."""
    if not (
        isinstance(paths, list)
        and set(map(type, paths)) <= {str, type(None)}
        and len(paths) == count
    ):
        raise ValueError(f"'{file}' is damaged: its paths are not those of its images.")
    return paths


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
    paths: Sequence[str | None] | None
    mapped: MappedTensors | None = None
    entry: dict[str, Any] | None = None
    left: Tensor | None = None
    _lengths: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.rows) if self.left is None else len(self.left)

    def kept(self, values: Tensor) -> Tensor:
        """Of values for each row, those of the rows that are left."""
        return values if self.left is None else values[self.left]

    def kept_paths(self) -> Sequence[str | None]:
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
        stay = torch.ones(len(self), dtype=torch.bool, device="cpu")
        stay[places] = False
        self.left = stay.nonzero()[:, 0] if self.left is None else self.left[stay]

    def pieces(self, wanted: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Rows that are left, their lengths, and their places among these, some at a time.

        With `wanted`, class ids, only images of these classes. Without lengths where `lengths_of`
        is to be asked for those of each block.
        """
        if self.left is None and wanted is None:
            for start in range(0, len(self), ROWS):
                piece = slice(start, start + ROWS)
                rows = self.rows[piece]
                yield rows, None, torch.arange(start, start + len(rows), device="cpu")
                self._release(piece)
            return
        lengths = self._all_lengths()
        places = torch.arange(len(self), device="cpu")
        if wanted is not None and self.labels is not None:
            places = torch.isin(self.kept(self.labels), wanted).nonzero()[:, 0]
        for start in range(0, len(places), ROWS):
            some = places[start : start + ROWS]
            numbers = some if self.left is None else self.left[some]
            yield self.rows[numbers], lengths[numbers], some
            self._release(slice(int(numbers[0]), int(numbers[-1]) + 1))

    def lengths_of(self, start: int, block: Tensor) -> Tensor:
        """Of the rows of a block, near 1: found once, as that takes longer than a query.

        Raises:
            ValueError: If a row is not finite.
        """
        if start not in self._lengths:
            lengths = row_norms(block.float())
            if not lengths.isfinite().all():
                _checks.check_finite("embeddings", block, first_row=start)
            self._lengths[start] = lengths.where(lengths > 0, 1).float()
        return self._lengths[start]

    def _all_lengths(self) -> Tensor:
        starts = range(0, len(self.rows), _BLOCK)
        for start in starts:
            if start not in self._lengths:
                block = slice(start, start + _BLOCK)
                self.lengths_of(start, self.rows[block])
                self._release(block)
        return torch.cat([self._lengths[start] for start in starts])

    def _release(self, piece: slice) -> None:
        if self.mapped is not None:
            self.mapped.release(self.rows[piece])


def places_of(indices: Any) -> Tensor:
    """Places in an index, each once, ascending."""
    listed = isinstance(indices, Iterable) and not isinstance(indices, (Tensor, np.ndarray))
    array = np.asarray([*indices] if listed else indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            "`indices` must be integers, several in a list, set, array or tensor, got "
            f"{type(indices).__name__} of {array.dtype}, shape {list(array.shape)}. Of a mask, "
            "take `numpy.flatnonzero(mask)`."
        )
    return torch.from_numpy(np.unique(array.astype(np.int64)))


def labels_of(segments: Sequence[Segment]) -> Tensor | None:
    """Class id of each image of all segments, or None."""
    labels = [s.kept(s.labels) for s in segments if s.labels is not None]
    return torch.cat(labels) if labels else None


def paths_of(segments: Sequence[Segment]) -> list[str | None] | None:
    """Path of each image of all segments, or None where none has one."""
    if all(segment.paths is None for segment in segments):
        return None
    return list(chain.from_iterable(segment.kept_paths() for segment in segments))


def nearest(
    segments: Sequence[Segment], queries: Tensor, k: int, wanted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The k nearest of all segments: scores, descending, and places in the index."""
    parts = unit_rows(queries).split(_QUERIES)
    best = [
        (part.new_zeros(len(part), 0), part.new_zeros(len(part), 0, dtype=torch.int64))
        for part in parts
    ]
    # One for all blocks: the system takes longer to hand out memory than a query takes.
    buffer = parts[0].new_empty(_BLOCK, queries.shape[1])
    first = 0
    for segment in segments:
        for rows, lengths, places in segment.pieces(wanted):
            for start in range(0, len(rows), _BLOCK):
                block = slice(start, start + _BLOCK)
                these = buffer[: len(rows[block])].copy_(rows[block])
                if lengths is None:
                    of_rows = segment.lengths_of(int(places[start]), these)
                else:
                    of_rows = lengths[block]
                for number, part in enumerate(parts):
                    scores, indices = best[number]
                    new, columns = highest(products(part, these).div_(of_rows), k)
                    # Of equal scores the first image is kept.
                    scores, order = highest(torch.cat([scores, new], dim=1), k)
                    new_indices = places[block][columns] + first
                    indices = torch.cat([indices, new_indices], dim=1).gather(1, order)
                    best[number] = scores, indices
        first += len(segment)
    all_scores, all_indices = zip(*best, strict=True)
    return torch.cat(all_scores).clamp_(-1, 1), torch.cat(all_indices)
