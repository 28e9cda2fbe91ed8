"""Similarities of labelled items and queries, in blocks whose size changes no value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairclip import _checks

# Similarities that are looked at in one block, and the most queries in it.
_BLOCK_CELLS = 1 << 23
_BLOCK_ROWS = 256
# Products of few rows or of a ragged last piece are added up in another order, and then equal
# items have unequal similarities. So no matrix product ends in such a piece.
_ROWS, _COLUMNS = 16, 64

_NAMES = ("embeddings", "labels", "queries", "query_labels")


class Search(NamedTuple):
    """What is searched and what for."""

    padded: Tensor  # [n, D] items as unit rows, then at least one row of zeros
    classes: Tensor  # [N] class of each item, 0 to C - 1
    queries: Tensor  # [M, D] unit rows
    query_classes: Tensor  # [M] the same for queries, C if no item is of their class
    own: bool  # whether query i is item i, which is then not among its results
    by_class: Tensor  # [N] items of class 0, then those of class 1, ...
    starts: Tensor  # [C + 1] where in `by_class` each class starts
    counts: Tensor  # [C + 1] items of each class; of class C none

    @property
    def items(self) -> Tensor:
        """The items, unit rows ``[N, D]``."""
        return self.padded[: len(self.classes)]

    def rows(self) -> Tensor:
        """Every query, int64 ``[M]``."""
        return torch.arange(len(self.queries), device=self.items.device)

    def relevant(self) -> Tensor:
        """Items that each query should find, int64 ``[M]``."""
        return self.counts[self.query_classes] - int(self.own)


class Block(NamedTuple):
    """Similarities of some queries with all items."""

    rows: Tensor  # [b] which queries
    scores: Tensor  # [b, n], -inf where there is no item: at the query itself and from N on
    members: Tensor  # [b, r] columns of the query's class, itself included, filled with N


def prepare(
    embeddings: Any,
    labels: Any,
    queries: Any = None,
    query_labels: Any = None,
    names: tuple[str, str, str, str] = _NAMES,
) -> Search:
    """Check the arguments, which have these names, and sort the items by class."""
    unit = _checks.unit_rows(_checks.as_embeddings(names[0], embeddings, finite=True))
    padded = unit.new_zeros((len(unit) // _COLUMNS + 1) * _COLUMNS, unit.shape[1])
    padded[: len(unit)] = unit
    items = padded[: len(unit)]
    labels = _checks.as_labels(names[1], labels, length=len(items)).to(items.device)
    if (queries is None) != (query_labels is None):
        raise ValueError(f"`{names[2]}` and `{names[3]}` go together; only one was given.")
    rows, row_labels = items, labels
    if queries is not None:
        rows = _checks.unit_rows(_checks.as_embeddings(names[2], queries, finite=True)).to(items)
        if rows.shape[1] != items.shape[1]:
            raise ValueError(
                f"`{names[2]}` must have embedding size {items.shape[1]}, got {rows.shape[1]}."
            )
        row_labels = _checks.as_labels(names[3], query_labels, length=len(rows)).to(items.device)
    ids, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Search(
        padded=padded,
        classes=classes,
        queries=rows,
        query_classes=_places(ids, row_labels),
        own=queries is None,
        by_class=classes.argsort(stable=True),
        starts=starts,
        counts=torch.cat([counts, counts.new_zeros(1)]),
    )


def _places(ids: Tensor, labels: Tensor) -> Tensor:
    """Where each label is in the ascending `ids`; their number if it is not there."""
    if not len(ids):
        return torch.zeros_like(labels)
    places = torch.searchsorted(ids, labels)
    known = ids[places.clamp_max(len(ids) - 1)] == labels
    return places.where(known, len(ids))


def blocks(search: Search, rows: Tensor) -> Iterator[Block]:
    """Similarities of these queries with all items. The next block overwrites the last."""
    count, items = len(search.items), search.padded
    columns, width = items.shape
    size = min(max(_BLOCK_CELLS // columns, 1), _BLOCK_ROWS, max(len(rows), 1))
    size = -(-size // _ROWS) * _ROWS
    queries, scores = items.new_zeros(size, width), items.new_empty(size, columns)
    for of_block in rows.split(size) if len(rows) else ():
        queries[: len(of_block)] = search.queries[of_block]
        with torch.autocast(items.device.type, enabled=False):
            torch.mm(queries, items.T, out=scores)
        found = scores[: len(of_block)]
        found[:, count:] = -torch.inf
        if search.own:
            found.scatter_(1, of_block[:, None], -torch.inf)
        yield Block(of_block, found, _members(search, of_block))


def _members(search: Search, rows: Tensor) -> Tensor:
    classes = search.query_classes[rows]
    counts = search.counts[classes][:, None]
    place = torch.arange(int(counts.max()), device=rows.device)
    inside = place < counts
    # Outside, any valid place will do.
    place = (search.starts[classes][:, None] + place).where(inside, 0)
    return search.by_class[place].where(inside, len(search.items))
