"""What batches of K items of each of P classes have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pairclip import _checks
from pairclip.samplers.decks import Decks, Indices, deal, group
from pairclip.samplers.epoch import EpochSampler


class PByKSampler(EpochSampler):
    """Batches of exactly K distinct items of each of P distinct classes, in a defined epoch."""

    def __init__(
        self,
        labels: Any,
        classes_per_batch: int,
        samples_per_class: int,
        num_batches: int | None,
        seed: int,
    ) -> None:
        super().__init__(seed)
        self._by_class = group(labels)
        _checks.check_positive_int("classes_per_batch", classes_per_batch)
        _checks.check_positive_int("samples_per_class", samples_per_class)
        self.classes_per_batch = int(classes_per_batch)
        self.samples_per_class = int(samples_per_class)
        self._set_num_batches(num_batches, len(self._by_class.order), self.batch_size)
        self._classes = np.flatnonzero(self._by_class.counts >= samples_per_class)

    @property
    def batch_size(self) -> int:
        """Items in each batch, P * K."""
        return self.classes_per_batch * self.samples_per_class

    def _deal_classes(
        self, classes: Indices, batches: int, batches_before: int, rng: np.random.Generator
    ) -> Iterator[list[int]]:
        """P distinct ones of the classes for each batch."""
        per_batch = np.full(batches, self.classes_per_batch, np.int64)
        before = batches_before * self.classes_per_batch
        drawn = deal(classes, per_batch, rng, seed=self._seed, dealt_before=before)
        return iter(drawn.reshape(batches, self.classes_per_batch).tolist())

    def _draw(self, decks: Decks, classes: Iterable[int]) -> list[int]:
        """K items of each of the classes."""
        drawn = [decks.draw(of_class, self.samples_per_class) for of_class in classes]
        batch: list[int] = np.concatenate(drawn).tolist()
        return batch
