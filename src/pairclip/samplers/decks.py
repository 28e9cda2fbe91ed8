"""Items by class, and shuffled decks of items that are dealt in chunks.

Four items by hand, in two chunks of three: six places are a whole deck of four and an incomplete
one of two, so two items come twice. They are dealt from the end: the two of the incomplete deck lie
last, and before them one of the whole deck that is neither, so that the second chunk has three
different items; the other three of the whole deck are the first chunk.

>>> items, chunks, rng = np.arange(4), np.array([3, 3]), np.random.default_rng(0)
>>> first = deal(items, chunks, rng, seed=0, dealt_before=0)
>>> [len(set(chunk)) for chunk in first.reshape(2, 3).tolist()]
[3, 3]
>>> sorted(np.bincount(first).tolist())
[1, 1, 2, 2]

The incomplete deck of the next epoch holds the two items that the first one lacked:

>>> second = deal(items, chunks, rng, seed=0, dealt_before=6)
>>> np.bincount(np.concatenate([first, second])).tolist()
[3, 3, 3, 3]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pairclip import _checks
from pairclip._randomness import SamplerStream, sampler_generator

Indices = npt.NDArray[Any]  # of integers; which, depends on how many there are


class Groups(NamedTuple):
    """Items sorted by class; class c has ``order[starts[c] : starts[c] + counts[c]]``."""

    class_of: Indices  # [N]
    order: Indices  # [N]
    starts: Indices  # [C]
    counts: Indices  # [C]

    def items_of(self, of_class: int) -> Indices:
        """Items of class number `of_class`."""
        start = self.starts[of_class]
        items: Indices = self.order[start : start + self.counts[of_class]]
        return items


def group(labels: Any) -> Groups:
    """Sort the items by class, in the smallest type that numbers them all."""
    array = _checks.label_array("labels", labels)
    if not len(array):
        raise ValueError("`labels` must have at least one item, got none.")
    small: Any = np.int32 if len(array) < 2**31 else np.int64
    order = np.argsort(array, kind="stable").astype(small)
    ordered = array[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    starts = np.flatnonzero(first).astype(small)
    counts: Indices = np.diff(np.append(starts, len(array))).astype(small)
    class_of = np.empty(len(array), small)
    class_of[order] = np.repeat(np.arange(len(starts), dtype=small), counts)
    return Groups(class_of, order, starts, counts)


def deal(
    items: Indices,
    chunks: Indices,
    rng: np.random.Generator,
    *,
    seed: int,
    dealt_before: int,
    distinct: bool = True,
) -> Indices:
    """``chunks.sum()`` items from shuffled decks, the last one incomplete.

    So counts differ by at most one. With `distinct`, the items of each chunk, at most
    ``len(items)`` of them, are distinct. Earlier epochs of the seed dealt `dealt_before` items: the
    incomplete deck takes up where they ended, so that all items have their turn.
    """
    total, size = int(chunks.sum()), len(items)
    if not total:
        return items[:0]
    rest = total % size
    deck = items
    if rest:
        order = sampler_generator(SamplerStream.DECK, seed, 0).permutation(size)
        deck = items[order.take(dealt_before % size + np.arange(rest), mode="wrap")]
    # Dealt from the end: a whole deck always has items that the rest of a chunk lacks.
    lengths = chunks[::-1]
    ends = np.cumsum(lengths)
    dealt = np.empty(total, items.dtype)
    start = 0
    while start < total:
        begun = missing = 0
        if distinct:
            chunk = int(np.searchsorted(ends, start, side="right"))
            missing = int(ends[chunk]) - start
            begun = int(lengths[chunk]) - missing
        before = dealt[start - begun : start]
        stop = start + len(deck)
        dealt[start:stop] = shuffled_after(deck, before, missing, rng)
        start, deck = stop, items
    return dealt[::-1]


def shuffled_after(
    items: Indices, before: Indices, count: int, rng: np.random.Generator
) -> Indices:
    """The items in random order, the first `count` of them distinct from those in `before`."""
    shuffled = rng.permutation(items)
    if not len(before):
        return shuffled
    fresh = np.flatnonzero(~np.isin(shuffled, before))[:count]
    rest = np.ones(len(shuffled), bool)
    rest[fresh] = False
    return np.concatenate([shuffled[fresh], shuffled[rest]])


def dealt_of_each(size: int, dealt: int, *, seed: int) -> Indices:
    """How often each of `size` items is among the first `dealt` ones that `deal` gave."""
    order = sampler_generator(SamplerStream.DECK, seed, 0).permutation(size)
    counts = np.full(size, dealt // size)
    counts[order[: dealt % size]] += 1
    return counts


class Decks:
    """A shuffled deck of items for each class, which is renewed when it runs out."""

    def __init__(self, groups: Groups, rng: np.random.Generator) -> None:
        self._groups = groups
        self._rng = rng
        self._decks: dict[int, Indices] = {}

    def draw(self, of_class: int, count: int) -> Indices:
        """`count` distinct items: what is left of the deck first, then from a new one."""
        deck = self._decks.get(of_class, self._groups.order[:0])
        if len(deck) < count:
            items = self._groups.items_of(of_class)
            deck = np.concatenate([deck, shuffled_after(items, deck, count - len(deck), self._rng)])
        self._decks[of_class] = deck[count:]
        return deck[:count]
