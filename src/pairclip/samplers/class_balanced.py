"""Batches of K items of each of P classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from pairclip._randomness import SamplerStream, sampler_generator
from pairclip.samplers.decks import Decks
from pairclip.samplers.p_by_k import PByKSampler


class ClassBalancedSampler(PByKSampler):
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
        super().__init__(labels, classes_per_batch, samples_per_class, num_batches, seed)
        counts = self._by_class.counts
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

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        rng = sampler_generator(SamplerStream.ANCHORS, self._seed, epoch)
        drawn = self._deal_classes(self._classes, len(self), epoch * len(self), rng)
        decks = Decks(self._by_class, rng)
        for number, classes in enumerate(drawn):
            batch = self._draw(decks, classes)
            if number >= first:
                yield batch
