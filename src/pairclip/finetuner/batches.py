"""Which images a process loads at each step, and with which randomness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pairclip._randomness import Stream, drawn_apart, random_state_kept, seed_all
from pairclip.datasets.loading import HostLoader
from pairclip.finetuner.agreement import BatchDigests
from pairclip.finetuner.images import FitImages, KeptDeck, kept_deck
from pairclip.samplers import PairSampler, default_sampler
from pairclip.towers.preprocess import Preprocess

BATCH_SIZE, KEEP_SHARE = 128, 0.25  # by default


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


class TrainingItems(Dataset[tuple[Tensor, int, int]]):
    """Preprocessed images, class ids and indices; what is random follows from the key."""

    def __init__(
        self, images: FitImages, preprocess: Callable[[Any], Tensor], *, seed: int
    ) -> None:
        self.images = images
        self.preprocess = preprocess
        self.seed = seed
        self._at_once = isinstance(preprocess, Preprocess) and preprocess.fixed
        # Seeds take as long as small images do, and here nothing draws.
        self._draws = not (images.of_features or (self._at_once and images.in_memory))

    def __getitems__(self, keys: list[ItemKey]) -> list[tuple[Tensor, int, int]]:
        """The items of one batch (a `DataLoader` asks for them at once)."""
        with random_state_kept() if self._draws else nullcontext():
            if not self._at_once:
                return [self[key] for key in keys]
            labels: list[int] = []
            preprocess: Any = self.preprocess
            pixel_values = preprocess.batch(self._images(keys, labels))
        return list(zip(pixel_values, labels, [key.item for key in keys], strict=True))

    def _images(self, keys: list[ItemKey], labels: list[int]) -> Iterator[Any]:
        """The images one by one, whose labels are added to `labels`."""
        for key in keys:
            image, label = self._read(key)
            labels.append(label)
            yield image

    def __getitem__(self, key: ItemKey) -> tuple[Tensor, int, int]:
        """One item; it seeds the global generators of Python, NumPy and torch (CPU)."""
        image, label = self._read(key)
        return self.preprocess(image), label, key.item

    def _read(self, key: ItemKey) -> tuple[Any, int]:
        if self._draws:
            seed_all(Stream.ITEM, self.seed, key.epoch, key.position)
        return self.images[key.item]


@dataclass(eq=False)
class RunBatches:
    """One process's slices of a run's batches; loading does not pause between epochs.

    The global generators that the sampler may draw from follow from (seed, epoch), so that every
    process and every resumed run gets the same batches. A generator of its own must be in the
    same state wherever, and whenever, the run is started.

    Args:
        sampler: Gives the whole batches.
        num_items: Items of the dataset.
        steps: The steps to load, from 0.
        seed: Decides what a sampler without a seed of its own draws.
        process: Number of this process.
        num_processes: Processes that share each batch.
        kept: Adds images to keep to each batch, if given.
        digests: Are told of each batch, if given.

    Raises:
        ValueError: If the sampler yields more or fewer batches than its ``len()``, indices
            that the dataset does not have, or a batch that the processes don't divide.
        TypeError: If it yields something other than batches of indices.
    """

    sampler: BatchSampler
    _: KW_ONLY
    num_items: int
    steps: range
    seed: int = 0
    process: int = 0
    num_processes: int = 1
    kept: KeptDeck | None = None
    digests: BatchDigests | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[ItemKey]]:
        step = epoch = 0
        if hasattr(self.sampler, "set_epoch"):
            # Other samplers are gone through from the start, to be where they were.
            epoch = self.steps.start // len(self.sampler)
            step = epoch * len(self.sampler)
        while step < self.steps.stop:
            position = 0
            for batch in self._epoch(epoch):
                if step in self.steps:
                    yield self._share(batch, epoch, position)
                position += len(batch)
                step += 1
                if step == self.steps.stop:
                    return
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Sequence[int]]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        batches = drawn_apart(lambda: iter(self.sampler), Stream.BATCHES, self.seed, epoch)
        kept = None if self.kept is None else self.kept.epoch(epoch, len(self.sampler))
        count = 0
        for batch in batches:
            count += 1
            if count > len(self.sampler):
                break
            self._check(batch)
            yield batch if kept is None else [*batch, *kept[count - 1]]
        if count != len(self.sampler):
            more = "more" if count > len(self.sampler) else f"only {count}"
            raise ValueError(
                f"`sampler` yielded {more} batches in epoch {epoch}, but its len() is "
                f"{len(self.sampler)}. Make len() the number of batches that it yields."
            )

    def _share(self, batch: Sequence[int], epoch: int, position: int) -> list[ItemKey]:
        if self.digests is not None:
            self.digests.add(batch)
        share, rest = divmod(len(batch), self.num_processes)
        if rest:
            raise ValueError(
                f"A batch of {len(batch)} images can't be divided among {self.num_processes} "
                "processes. Choose a batch size that is a multiple of their number."
            )
        mine = range(self.process * share, (self.process + 1) * share)
        return [ItemKey(epoch, position + i, int(batch[i])) for i in mine]

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, (Sequence, np.ndarray, Tensor)):
            raise TypeError(
                f"`sampler` must yield batches, lists of indices, got {batch!r}. Wrap a sampler "
                "of single indices in `torch.utils.data.BatchSampler`."
            )
        kind = np.asarray(batch)
        if kind.ndim != 1 or (kind.size and kind.dtype.kind not in "iu"):
            raise TypeError(
                f"`sampler` must yield batches, lists of indices, got one of shape "
                f"{list(kind.shape)} and type {kind.dtype}."
            )
        if not len(batch) or min(batch) < 0 or max(batch) >= self.num_items:
            raise ValueError(
                f"`sampler` yielded the batch {list(batch)[:8]}, but indices must be in "
                f"[0, {self.num_items}). Make the sampler from the labels of this very dataset, "
                "`pairclip.labels_of(dataset)`."
            )


def choose_batches(
    loss: Callable[..., Tensor],
    images: FitImages,
    sampler: BatchSampler | None,
    *,
    batch_size: int,
    keep_share: float,
    seed: int,
) -> tuple[BatchSampler, KeptDeck | None]:
    """What gives the labelled part of each batch, by default too, and what gives the part to keep.

    Raises:
        TypeError: If `sampler` is no batch sampler.
        ValueError: If it is not one for the loss, or an argument would be ignored.
    """
    pairs = getattr(loss, "takes_pairs", False)
    if sampler is not None:
        _check_sampler(sampler, pairs=pairs)
        if batch_size != BATCH_SIZE:
            raise ValueError(f"`batch_size` {batch_size} would be ignored: `sampler` decides.")
    kept = None
    if images.keep is not None:
        kept = kept_deck(images, keep_share, sampler, batch_size, seed)
        batch_size -= kept.per_batch
    elif keep_share != KEEP_SHARE:
        raise ValueError(f"`keep_share` {keep_share} would be ignored: there is no `keep`.")
    if sampler is None:
        number = len(images.data)
        if batch_size + (0 if kept is None else kept.per_batch) == BATCH_SIZE > 2 * number > 2:
            warnings.warn(
                f"`batch_size` is {BATCH_SIZE} by default, more than `dataset` can fill with its "
                f"{number} images: batches have {number - number % 2} of them.",
                stacklevel=3,
            )
            batch_size = number - number % 2
        sampler = default_sampler(images.data.labels, batch_size, seed, pairs=pairs)
    return sampler, kept


def _check_sampler(sampler: BatchSampler, *, pairs: bool) -> None:
    """Raise unless `sampler` can give batches, of pairs if the loss takes pairs."""
    if pairs and not isinstance(sampler, PairSampler):
        raise ValueError(
            f"`loss` takes the pairs of a `PairSampler`, got {type(sampler).__name__}. Use "
            "`AllPairsCosineLoss` for other batches."
        )
    if not isinstance(sampler, BatchSampler):
        raise TypeError(f"`sampler` must have `__iter__` and `__len__`, got {sampler!r}.")
    if not len(sampler):
        raise ValueError(
            "`sampler` has no batch, its len() is 0. Are its batches larger than the dataset, with "
            "drop_last=True?"
        )


def loader_of(
    items: TrainingItems,
    batches: RunBatches,
    device: torch.device,
    workers: Mapping[str, Any],
) -> HostLoader:
    """Loads the batches, and leaves the global generators alone."""
    return HostLoader(
        items,
        batch_sampler=batches,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(items.seed),
        collate_fn=_collate,
        **workers,
    )


def _collate(items: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """What a `DataLoader` makes of them, in memory of the host whatever the default device."""
    pixels, labels, numbers = zip(*items, strict=True)
    return (
        default_collate([*pixels]),
        torch.tensor(labels, device="cpu"),
        torch.tensor(numbers, device="cpu"),
    )
