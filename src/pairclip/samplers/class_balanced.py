"""Batches of K items of each of P classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from pairclip import _checks
from pairclip._randomness import SamplerStream, sampler_generator
from pairclip.samplers.decks import Decks, deal, group
from pairclip.samplers.epoch import EpochSampler, num_batches_of


class ClassBalancedSampler(EpochSampler):
    """Batches of K items of each of P classes, for losses over all pairs of a batch.

    Every batch holds exactly ``samples_per_class`` distinct items of each of
    ``classes_per_batch`` distinct classes. Over an epoch the classes are drawn equally often, up
    to one, and each class deals its items from a shuffled deck: none comes again before all of
    its class have come.

    The epoch is a function of (seed, epoch). An iteration that was broken off goes on with the
    next batch; `set_epoch` rewinds.

    Args:
        labels: Class of each item, ``[N]`` integers.
        classes_per_batch: P.
        samples_per_class: K. Classes with fewer items are left out.
        num_batches: Batches of an epoch; None for ``ceil(N / (P * K))``.
        seed: Not negative.

    Raises:
        ValueError: If an argument is out of range, or fewer than P classes have K items.
        TypeError: If labels or counts are not integers.

    Warns:
        UserWarning: Once, with the number of classes that are left out.

    Example:
        >>> from pairclip import ClassBalancedSampler
        >>> sampler = ClassBalancedSampler([0, 0, 0, 1, 1, 2, 2], 2, 2)
        >>> len(sampler), [len(batch) for batch in sampler]
        (2, [4, 4])
    """

    def __init__(
        self,
        labels: Any,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        num_batches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self._groups = group(labels)
        _checks.check_positive_int("classes_per_batch", classes_per_batch)
        _checks.check_positive_int("samples_per_class", samples_per_class)
        self.classes_per_batch = int(classes_per_batch)
        self.samples_per_class = int(samples_per_class)
        self._num_batches = num_batches_of(num_batches, len(self._groups.order), self.batch_size)
        counts = self._groups.counts
        self._classes = np.flatnonzero(counts >= samples_per_class)
        left_out = len(counts) - len(self._classes)
        if len(self._classes) < classes_per_batch:
            raise ValueError(
                f"`classes_per_batch` is {classes_per_batch}, but only {len(self._classes)} of "
                f"{len(counts)} classes have the {samples_per_class} items that "
                "`samples_per_class` asks for. Lower one of the two."
            )
        if left_out:
            items = int(counts[counts < samples_per_class].sum())
            warnings.warn(
                f"{left_out} of {len(counts)} classes have fewer than {samples_per_class} items: "
                f"these {items} items are left out.",
                stacklevel=2,
            )

    @property
    def batch_size(self) -> int:
        """Items in each batch, P * K."""
        return self.classes_per_batch * self.samples_per_class

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._num_batches

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        rng = sampler_generator(SamplerStream.ANCHORS, self._seed, epoch)
        per_batch = np.full(self._num_batches, self.classes_per_batch, np.int64)
        dealt_before = epoch * int(per_batch.sum())
        drawn = deal(self._classes, per_batch, rng, seed=self._seed, dealt_before=dealt_before)
        decks = Decks(self._groups, rng)
        for number, classes in enumerate(drawn.reshape(len(per_batch), -1).tolist()):
            batch: list[int] = []
            for of_class in classes:
                batch += decks.draw(of_class, self.samples_per_class).tolist()
            if number >= first:
                yield batch
