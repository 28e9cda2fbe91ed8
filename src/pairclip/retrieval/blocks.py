"""Similarities of labelled items and queries, in blocks whose size changes no value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pairclip import _checks
from pairclip._vectors import finite_unit_rows, products

T = TypeVar("T")

# Similarities that are looked at in one block, and the most queries in it. The system hands out
# more than 32 MiB page by page, which takes as long as the product.
_BLOCK_CELLS = 1 << 22
_BLOCK_ROWS = 256
# Blocks that are looked at at once, each of which takes up to about 75 MB.
_MOST_WORKERS = 16
# Products of few rows or of a ragged last piece are added up in another order, and then equal
# items have unequal similarities. So no matrix product ends in such a piece.
_ROWS, _COLUMNS = 16, 64

# Below every cosine; within -2 and 2, as ranking needs it.
NO_ITEM = -1.5
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
    # Items that are neither a find nor a miss for a query of their class, as those of its group
    # are, have its slot: [N] of each item and [M] of each query, negative where there is none.
    slots: Tensor | None = None
    query_slots: Tensor | None = None

    @property
    def items(self) -> Tensor:
        """The items, unit rows ``[N, D]``."""
        return self.padded[: len(self.classes)]

    def rows(self) -> Tensor:
        """Every query, int64 ``[M]``."""
        return torch.arange(len(self.queries), device=self.items.device)

    def relevant(self) -> Tensor:
        """Items that each query should find, int64 ``[M]``."""
        return self.counts[self.query_classes] - self.left_out()

    def left_out(self) -> Tensor:
        """Items that each query is not compared with, int64 ``[M]``: itself and its group."""
        own = torch.full_like(self.query_classes, int(self.own))
        if self.slots is None or self.query_slots is None:
            return own
        sizes = self.slots.clamp_min(-1).add(1).bincount(minlength=len(self.slots) + 1)[1:]
        return torch.where(self.query_slots < 0, own, sizes[self.query_slots.clamp_min(0)])


class Block(NamedTuple):
    """Similarities of some queries with all items."""

    rows: Tensor  # [b] which queries
    scores: Tensor  # [b, n], NO_ITEM where none is: at what is left out and from N on
    members: Tensor  # [b, r] columns of the query's class, itself included, filled with N


def prepare(
    embeddings: Any,
    labels: Any,
    queries: Any = None,
    query_labels: Any = None,
    *,
    groups: Tensor | None = None,
    query_groups: Tensor | None = None,
    names: tuple[str, str, str, str] = _NAMES,
) -> Search:
    """Check the arguments, which have these names, and sort the items by class.

    `groups` are int64 of each item and query, from 0 on, or negative for a group of one.
    """
    unit = _unit(names[0], embeddings)
    padded = unit.new_zeros((len(unit) // _COLUMNS + 1) * _COLUMNS, unit.shape[1])
    padded[: len(unit)] = unit
    items = padded[: len(unit)]
    labels = _checks.as_labels(names[1], labels, length=len(items)).to(items.device)
    if (queries is None) != (query_labels is None):
        raise ValueError(f"`{names[2]}` and `{names[3]}` go together; only one was given.")
    rows, row_labels = items, labels
    if queries is not None:
        rows = _unit(names[2], queries).to(items)
        if rows.shape[1] != items.shape[1]:
            raise ValueError(
                f"`{names[2]}` must have embedding size {items.shape[1]}, got {rows.shape[1]}."
            )
        row_labels = _checks.as_labels(names[3], query_labels, length=len(rows)).to(items.device)
    ids, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    query_classes = _places(ids, row_labels)
    slots = query_slots = None
    if groups is not None:
        of_queries = groups if query_groups is None else query_groups
        slots, query_slots = _slots(
            classes, groups.to(items.device), query_classes, of_queries.to(items.device)
        )
    return Search(
        padded=padded,
        classes=classes,
        queries=rows,
        query_classes=query_classes,
        own=queries is None,
        by_class=classes.argsort(stable=True),
        starts=starts,
        counts=torch.cat([counts, counts.new_zeros(1)]),
        slots=slots,
        query_slots=query_slots,
    )


def _unit(name: str, embeddings: Any) -> Tensor:
    rows = _checks.as_embeddings(name, embeddings).detach()
    if rows.dtype != torch.float64:
        rows = rows.float()
    return finite_unit_rows(name, rows)


def _slots(
    classes: Tensor, groups: Tensor, query_classes: Tensor, query_groups: Tensor
) -> tuple[Tensor, Tensor]:
    """A number for each class and group that items have, of each item and of each query."""
    base = 1 + int(max(groups.max(), query_groups.max()))
    keys, query_keys = classes * base + groups, query_classes * base + query_groups
    ids, slots = keys.unique(return_inverse=True)
    query_slots = _places(ids, query_keys)
    known = (query_groups >= 0) & (query_slots < len(ids))
    return slots.where(groups >= 0, -1), query_slots.where(known, -2)


def _places(ids: Tensor, labels: Tensor) -> Tensor:
    """Where each label is in the ascending `ids`; their number if it is not there."""
    if not len(ids):
        return torch.zeros_like(labels)
    places = torch.searchsorted(ids, labels)
    known = ids[places.clamp_max(len(ids) - 1)] == labels
    return places.where(known, len(ids))


def over_blocks(search: Search, rows: Tensor, work: Callable[[Block], T]) -> Iterator[T]:
    """What `work` makes of the similarities of these queries with all items, block by block.

    On the CPU several threads work at once, each on blocks of its own and with one thread of
    torch: so none waits for another. (A thread elsewhere that first uses torch meanwhile is left
    with one thread, too.) A block may be overwritten, and is by the next.
    """
    count, items = len(search.items), search.padded
    # Of each item of a query's class, several numbers are kept beside its similarity.
    cells = len(items) + 8 * int(search.counts.max())
    size = min(max(_BLOCK_CELLS // cells, 1), _BLOCK_ROWS, max(len(rows), 1))
    size = -(-size // _ROWS) * _ROWS
    parts = rows.split(size) if len(rows) else ()
    threads = torch.get_num_threads()
    workers = min(threads, _MOST_WORKERS, len(parts)) if items.device.type == "cpu" else 1
    spare = [items.new_zeros(size, items.shape[1]) for _ in range(workers)]

    # Inference mode is each thread's own, and its tensors can't be written to without it.
    @torch.inference_mode(torch.is_inference_mode_enabled())
    def run(of_block: Tensor) -> T:
        queries = spare.pop()
        queries[: len(of_block)] = search.queries[of_block]
        of_items = products(queries, items)[: len(of_block)]
        spare.append(queries)
        of_items[:, count:] = NO_ITEM
        if search.own:
            of_items.scatter_(1, of_block[:, None], NO_ITEM)
        members = _members(search, of_block)
        if search.slots is not None and search.query_slots is not None:
            slots = torch.cat([search.slots, search.slots.new_full((1,), -1)])
            out = slots[members] == search.query_slots[of_block, None]
            of_items.scatter_(1, members.where(out, count), NO_ITEM)
            members = members.masked_fill(out, count)
        return work(Block(of_block, of_items, members))

    if workers <= 1:
        yield from map(run, parts)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(run, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        # What a thread sets is also what threads that come after it start with.
        torch.set_num_threads(threads)


def _members(search: Search, rows: Tensor) -> Tensor:
    classes = search.query_classes[rows]
    if (classes == classes[0]).all() and classes[0] < len(search.counts) - 1:
        start, stop = search.starts[classes[0]], search.starts[classes[0] + 1]
        return search.by_class[start:stop].expand(len(rows), -1)
    counts = search.counts[classes][:, None]
    place = torch.arange(int(counts.max()), device=rows.device)
    inside = place < counts
    # Outside, any valid place will do.
    place = (search.starts[classes][:, None] + place).where(inside, 0)
    members = search.by_class.index_select(0, place.flatten()).view_as(place)
    return members.where(inside, len(search.items))
