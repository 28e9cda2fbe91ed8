"""Batches of K items of each of P classes, all of one group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from pairclip import _checks
from pairclip._randomness import SamplerStream, sampler_generator
from pairclip.samplers.decks import Decks, Indices, deal, dealt_of_each, group
from pairclip.samplers.p_by_k import PByKSampler


class GroupSampler(PByKSampler):
    """Batches of K items of each of P classes within a group: negatives that are alike.

    A group is what makes images of different classes alike: a superclass, a domain, a shop. Every
    batch holds exactly ``samples_per_class`` distinct items of each of ``classes_per_batch``
    distinct classes, all of one group; a class may be in several groups. Groups take turns: over
    an epoch they come equally often, up to one, and so do the classes within each group. Each
    class of a group deals its items from a shuffled deck, as in a `ClassBalancedSampler`.

    With `mixed`, that share of an epoch's batches, anywhere among the others, is drawn from all
    groups together, as a `ClassBalancedSampler` would: else no pair of two groups is ever compared.

    The epoch is a function of (seed, epoch). An iteration that was broken off goes on with the
    next batch; `set_epoch` rewinds.

    Args:
        labels: Class of each item, ``[N]`` integers.
        groups: Group of each item, ``[N]`` integers or names.
        classes_per_batch: P.
        samples_per_class: K. Classes with fewer items in a group are left out of it, and groups
            with fewer than P such classes altogether.
        mixed: Share of batches of all groups, in ``[0, 1)``, rounded to
            ``floor(mixed * num_batches + 0.5)`` batches of an epoch.
        num_batches: Batches of an epoch; None for ``ceil(N / (P * K))``.
        seed: Not negative.

    Raises:
        ValueError: If an argument is out of range, or no group has P classes of K items.
        TypeError: If labels or counts are not integers.

    Warns:
        UserWarning: Once, with the number of groups, and of items, that are left out.

    Example:
        >>> from pairclip import GroupSampler
        >>> labels = [0, 0, 1, 1, 2, 2, 3, 3]
        >>> groups = ["cats", "cats", "cats", "cats", "dogs", "dogs", "dogs", "dogs"]
        >>> for batch in GroupSampler(labels, groups, 2, 2):
        ...     print(len(batch), {groups[i] for i in batch} in ({"cats"}, {"dogs"}))
        4 True
        4 True
    """

    def __init__(
        self,
        labels: Any,
        groups: Any,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        mixed: float = 0.0,
        num_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(labels, classes_per_batch, samples_per_class, num_batches, seed)
        num_items = len(self._by_class.order)
        group_of = _group_array(groups, num_items)
        _checks.check_number("mixed", mixed)
        if not 0 <= mixed < 1:
            raise ValueError(
                f"`mixed` must be in [0, 1), got {mixed}. If all batches are of all groups, use "
                "`ClassBalancedSampler`."
            )
        self.mixed = float(mixed)
        self._num_mixed = int(mixed * self._num_batches + 0.5)
        if self._num_mixed == self._num_batches:
            raise ValueError(
                f"`mixed` {mixed} of {self._num_batches} batches rounds to all of them. Lower it, "
                "or use `ClassBalancedSampler`."
            )
        # A cell is a class within a group.
        num_classes = len(self._by_class.counts)
        self._by_cell = group(group_of * num_classes + self._by_class.class_of)
        first_items = self._by_cell.order[self._by_cell.starts]
        cells = np.flatnonzero(self._by_cell.counts >= samples_per_class)
        of_group = group_of[first_items[cells]]
        self._cells = [
            cells[of_group == number]
            for number in np.flatnonzero(np.bincount(of_group) >= classes_per_batch)
        ]
        num_groups = int(group_of.max()) + 1
        if not self._cells:
            raise ValueError(
                f"None of {num_groups} groups has {classes_per_batch} classes with "
                f"{samples_per_class} items each, as `classes_per_batch` and `samples_per_class` "
                "ask for. Lower one of the two."
            )
        items = num_items - int(self._by_cell.counts[np.concatenate(self._cells)].sum())
        if items:
            left_out = num_groups - len(self._cells)
            warnings.warn(
                f"{left_out} of {num_groups} groups have fewer than {classes_per_batch} classes "
                f"with {samples_per_class} items each. With these groups, and smaller classes of "
                f"others, {items} items are left out of the batches of one group.",
                stacklevel=2,
            )

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        rng = sampler_generator(SamplerStream.ANCHORS, self._seed, epoch)
        in_groups = self._num_batches - self._num_mixed
        before = epoch * in_groups
        turns = deal(
            np.arange(len(self._cells)),
            np.array([in_groups]),
            rng,
            seed=self._seed,
            dealt_before=before,
            distinct=False,
        )
        turns_before = dealt_of_each(len(self._cells), before, seed=self._seed)
        of_groups = [
            self._deal_classes(cells, count, done, rng)
            for cells, count, done in zip(
                self._cells,
                np.bincount(turns, minlength=len(self._cells)).tolist(),
                turns_before.tolist(),
                strict=True,
            )
        ]
        of_all = self._deal_classes(self._classes, self._num_mixed, epoch * self._num_mixed, rng)
        by_cell, by_class = Decks(self._by_cell, rng), Decks(self._by_class, rng)
        is_mixed = rng.permutation(np.arange(self._num_batches) < self._num_mixed)
        next_turn = iter(turns.tolist())
        for number, from_all in enumerate(is_mixed.tolist()):
            chosen = next(of_all) if from_all else next(of_groups[next(next_turn)])
            decks = by_class if from_all else by_cell
            batch = self._draw(decks, chosen)
            if number >= first:
                yield batch


def _group_array(groups: Any, num_items: int) -> Indices:
    """Number of each item's group, from 0."""
    array = np.asarray(groups)
    if array.ndim != 1 or len(array) != num_items:
        raise ValueError(
            f"`groups` must have one group for each of {num_items} labels, got shape "
            f"{list(array.shape)}."
        )
    if array.dtype.kind not in "iubUS":
        raise TypeError(f"`groups` must be integers or names, got {array.dtype}.")
    numbers: Indices = np.unique(array, return_inverse=True)[1]
    return numbers
