"""What batch samplers share: their place in an epoch, items by class, and decks of items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
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


class EpochSampler(ABC):
    """State of a batch sampler: (seed, epoch) decide an epoch's batches, `batch` is the next."""

    def __init__(self, seed: int) -> None:
        self._seed = _checks.check_count("seed", seed)
        self._epoch = 0
        self._batch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches of a whole epoch."""

    @abstractmethod
    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        """Batches of the epoch, from number `first` on."""

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rest of the current epoch; the one after it begins at the next call."""
        epoch, batch = self._epoch, self._batch
        for indices in self._epoch_batches(epoch, batch):
            batch += 1
            self._move_to(epoch, batch)
            yield indices

    def _move_to(self, epoch: int, batch: int) -> None:
        ended = batch == len(self)
        self._epoch, self._batch = (epoch + 1, 0) if ended else (epoch, batch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the first batch of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self._epoch, self._batch = _checks.check_count("epoch", epoch), 0

    def state_dict(self) -> dict[str, int]:
        """Position: ``seed``, ``epoch`` and ``batch``, the number of the next batch."""
        return {"seed": self._seed, "epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another sampler with the same labels and settings was.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If keys are missing or unknown, or the batch is beyond the epoch.
        """
        if set(state) != {"seed", "epoch", "batch"}:
            raise ValueError(
                f"`state` must have the keys seed, epoch and batch, got {sorted(state)}."
            )
        seed, epoch, batch = (_checks.check_count(k, state[k]) for k in ("seed", "epoch", "batch"))
        if batch > len(self):
            raise ValueError(
                f"`state` is at batch {batch}, but an epoch has {len(self)}. It comes from a "
                "sampler with other labels or settings."
            )
        self._seed = seed
        self._move_to(epoch, batch)


def deal(
    items: Indices,
    chunks: Indices,
    key: tuple[int, int],
    rng: np.random.Generator,
    *,
    distinct: bool = True,
) -> Indices:
    """``chunks.sum()`` items from shuffled decks, the last one incomplete.

    So counts differ by at most one. With `distinct`, the items of each chunk, at most
    ``len(items)`` of them, are distinct. The key is the seed, and how many items earlier epochs
    dealt: the incomplete deck takes up where they ended, so that all items have their turn.
    """
    total, size = int(chunks.sum()), len(items)
    if not total:
        return items[:0]
    seed, dealt_before = key
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


def num_batches_of(num_batches: int | None, num_items: int, per_batch: int) -> int:
    """Batches of an epoch: as many as were asked for, or as cover all items."""
    if num_batches is None:
        return -(-num_items // per_batch)
    _checks.check_positive_int("num_batches", num_batches)
    return int(num_batches)
