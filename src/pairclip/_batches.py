"""Which images a run loads at each step, and with which randomness."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pairclip.datasets import LabelledImages


@runtime_checkable
class BatchSampler(Protocol):
    """Yields batches of indices; ``len()`` is the number of batches of an epoch."""

    def __iter__(self) -> Iterator[Sequence[int]]: ...

    def __len__(self) -> int: ...


class ItemKey(NamedTuple):
    """One item of a run: where in the run it comes, and its index in the dataset."""

    epoch: int
    position: int
    item: int


class TrainingItems(Dataset[tuple[Tensor, int]]):
    """Preprocessed images and class ids; a random transform draws the same for the same key."""

    def __init__(
        self, data: LabelledImages, preprocess: Callable[[Any], Tensor], *, seed: int
    ) -> None:
        self.data = data
        self.preprocess = preprocess
        self.seed = seed

    def __getitems__(self, keys: list[ItemKey]) -> list[tuple[Tensor, int]]:
        """The items of one batch (a `DataLoader` asks for them at once)."""
        with _random_state_kept():
            return [self[key] for key in keys]

    def __getitem__(self, key: ItemKey) -> tuple[Tensor, int]:
        """One item; it seeds the global generators of Python, NumPy and torch (CPU)."""
        sequence = np.random.SeedSequence((self.seed, key.epoch, key.position))
        seed = int(sequence.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - users' transforms draw from it
        torch.default_generator.manual_seed(seed)
        image, label = self.data[key.item]
        return self.preprocess(image), label


class RunBatches:
    """The batches of a whole run, so that loading does not pause between epochs.

    Raises:
        ValueError: If the sampler yields more or fewer batches than its ``len()``, or indices
            that the dataset does not have.
        TypeError: If it yields something other than batches of indices.
    """

    def __init__(self, sampler: BatchSampler, *, num_items: int, num_steps: int) -> None:
        self.sampler = sampler
        self.num_items = num_items
        self.num_steps = num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[ItemKey]]:
        step = epoch = 0
        while step < self.num_steps:
            set_epoch = getattr(self.sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            position = batches = 0
            for batch in self.sampler:
                self._check(batch)
                batches += 1
                if batches > len(self.sampler):
                    break
                yield [ItemKey(epoch, position + i, index) for i, index in enumerate(batch)]
                position += len(batch)
                step += 1
                if step == self.num_steps:
                    return
            if batches != len(self.sampler):
                more = "more" if batches > len(self.sampler) else f"only {batches}"
                raise ValueError(
                    f"`sampler` yielded {more} batches in epoch {epoch}, but its len() is "
                    f"{len(self.sampler)}. Make len() the number of batches that it yields."
                )
            epoch += 1

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, (Sequence, np.ndarray, Tensor)):
            raise TypeError(
                f"`sampler` must yield batches, lists of indices, got {batch!r}. Wrap a sampler "
                "of single indices in `torch.utils.data.BatchSampler`."
            )
        if not len(batch) or min(batch) < 0 or max(batch) >= self.num_items:
            raise ValueError(
                f"`sampler` yielded the batch {list(batch)[:8]}, but indices must be in "
                f"[0, {self.num_items}). Make the sampler from the labels of this very dataset, "
                "`pairclip.labels_of(dataset)`."
            )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
