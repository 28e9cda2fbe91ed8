"""Batches of P classes times K images from a stream, through a bounded buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from pairclip import _checks
from pairclip._randomness import Stream, drawn_apart
from pairclip.datasets.checking import Problem
from pairclip.datasets.loading import HostLoader
from pairclip.datasets.notices import Notices
from pairclip.datasets.stream_items import (
    Decoder,
    PixelBatch,
    StreamBatch,
    StreamItem,
    StreamPlace,
    as_it_is,
    item_of,
)

_ALL = slice(None)


class StreamBatches:
    """Batches from a stream that is larger than memory, or has no length.

    Give it to `Finetuner.fit` in place of a dataset, or iterate it in your own loop. At most
    `buffer_size` items wait in a buffer, as the stream gave them. Each batch takes K random items
    of each of P random classes out of it. An epoch is one pass over the stream, and uses no item
    twice; those of classes that don't get K together, and those in the buffer when the stream ends
    and fewer than P classes have K, are left out and counted in one warning.

    The main process alone reads the stream, and workers decode, so the batches are the same for any
    number of them. Under several processes each reads all of it and trains on its slice of each
    batch.

    Args:
        stream: Iterated once an epoch: a streaming Hugging Face dataset, a WebDataset, any
            iterable. Its ``set_epoch`` is called with the epoch, if it has one. Its items are pairs
            (image, label), or dicts.
        preprocess: From a PIL image to pixel values ``[3, H, W]``, for instance
            ``tower.preprocess``.
        classes_per_batch: P.
        samples_per_class: K.
        buffer_size: Items that wait; many times P K, or as much as memory holds. It should have K
            items of more than P classes, so shuffle a stream that is sorted by class before.
        class_names: Names of the class ids, for labels that are names.
        image: Key of the image in items that are dicts, such as "jpg".
        label: Key of the label, such as "cls".
        seed: Decides, with the epoch, what is drawn.
        on_error: "raise" stops at an image that can't be read. With "skip" another image of its
            class in the batch takes its place, so that batches stay of P classes times K; with
            one warning, and listed in `unreadable` and in the `History` of a fit, under several
            processes each those of its slices.

    Raises:
        ValueError: While iterating: if a full buffer has fewer than P classes of K items, an item
            has no label, or an image can't be read (with "skip", none of its class in the
            batch); it says which item.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from pairclip.datasets import StreamBatches
        >>> items = [(np.full((4, 4, 3), i, np.uint8), i % 3) for i in range(24)]
        >>> to_pixels = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        >>> batches = StreamBatches(items, to_pixels, 3, 2, buffer_size=12)
        >>> for pixel_values, labels in batches:
        ...     print(pixel_values.shape, labels.bincount().tolist())
        torch.Size([6, 3, 4, 4]) [2, 2, 2]
        torch.Size([6, 3, 4, 4]) [2, 2, 2]
        torch.Size([6, 3, 4, 4]) [2, 2, 2]
        torch.Size([6, 3, 4, 4]) [2, 2, 2]
    """

    def __init__(
        self,
        stream: Iterable[Any],
        preprocess: Callable[[Any], Tensor],
        classes_per_batch: int,
        samples_per_class: int,
        *,
        buffer_size: int,
        class_names: Sequence[str] | None = None,
        image: str = "image",
        label: str = "label",
        seed: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        _checks.check_choice("on_error", on_error, ("raise", "skip"))
        _checks.check_positive_int("classes_per_batch", classes_per_batch)
        _checks.check_positive_int("samples_per_class", samples_per_class)
        _checks.check_positive_int("buffer_size", buffer_size)
        if buffer_size < classes_per_batch * samples_per_class:
            raise ValueError(
                f"`buffer_size` must be at least the {classes_per_batch * samples_per_class} items "
                f"of a batch, got {buffer_size}. Many times as many mix classes better."
            )
        if on_error == "skip" and samples_per_class == 1:
            raise ValueError(
                "`on_error` 'skip' needs `samples_per_class` of at least 2, got 1: another image "
                "of its class takes the place of one that can't be read."
            )
        self.stream = stream
        self.preprocess = preprocess
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.buffer_size = buffer_size
        self.class_names = None if class_names is None else list(class_names)
        self.seed = seed
        self._ids = {name: id_ for id_, name in enumerate(class_names or ())}
        if class_names is not None and len(self._ids) < len(class_names):
            raise ValueError(f"`class_names` must be different names, got {class_names!r}.")
        self._keys = image, label
        self._skips = on_error == "skip"
        self._unreadable: dict[Problem, None] = {}
        self._next = StreamPlace(0, 0, None)
        self._notices = Notices()

    @property
    def unreadable(self) -> list[Problem]:
        """The images that ``on_error="skip"`` left out so far, each once.

        Their `index` is their position in an epoch of the stream.
        """
        return list(self._unreadable)

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Go on at a batch of an epoch, both from 0, as if never stopped.

        The stream is read up to there again, without decoding, and must give the same items. It
        holds for iterating and `load`; a fit starts at the first epoch, or at its checkpoint.

        Args:
            epoch: Which.
            batch: How many of its batches are left out.

        Raises:
            ValueError: If the stream can be read only once, or an argument is negative.
        """
        self._next = StreamPlace(
            _checks.check_count("epoch", epoch), _checks.check_count("batch", batch), None
        )
        self._check_can_start(self._next)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, decoded in this process; next time those of the next epoch."""
        return self.load()

    def load(self, *, num_workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, decoded by workers, the same for any number of them.

        Args:
            num_workers: Processes that decode; 0 does it in this one.

        Yields:
            Pixel values ``[P K, 3, H, W]`` and class ids ``[P K]``, int64.
        """
        epoch, first, _ = self._next
        self._next = StreamPlace(epoch + 1, 0, None)
        drawn = (batch for batch in self._epoch(epoch) if batch.place.batch > first)
        for batch in self._decode(drawn, num_workers=num_workers):
            yield batch.pixel_values, batch.labels

    def run(
        self, start: StreamPlace, num_batches: int, share: slice, **loading: Any
    ) -> Iterator[PixelBatch]:
        """A process's slices of so many batches, over epochs, each with the place after it.

        Args:
            start: The place after the last batch before.
            num_batches: Batches to load.
            share: Items of each batch that are this process's.
            loading: Arguments of the `DataLoader`.

        Yields:
            Pixel values, class ids, the place, and images that were left out in this batch.

        Raises:
            ValueError: While iterating: if the stream can be read only once and `start` is not its
                beginning, it gives other items than before, or an epoch has no batch.
        """
        self._check_can_start(start)
        yield from self._decode(self._from(start, num_batches, share), **loading)

    def _decode(self, drawn: Iterator[StreamBatch], **loading: Any) -> Iterator[PixelBatch]:
        loader = HostLoader(
            Decoder(self.preprocess, self.seed, self._notices, skips=self._skips),
            batch_sampler=drawn,
            collate_fn=as_it_is,
            **loading,
        )
        for batch in loader:
            for problem in batch.unreadable:
                self._unreadable[problem] = None
                self._notices.say(
                    "unreadable",
                    f"Item {problem.index} of the stream can't be read ({problem.reason}), so "
                    "another image of its class takes its place. Others like it are listed in "
                    "`unreadable` without a warning.",
                )
            yield batch

    def _check_can_start(self, start: StreamPlace) -> None:
        if isinstance(self.stream, Iterator) and (start.epoch or start.batch):
            raise ValueError(
                f"`stream` is a {type(self.stream).__name__} that can be read once, so no place in "
                "it can be found again. Give an iterable that starts anew, such as a dataset."
            )

    def _from(self, start: StreamPlace, num_batches: int, share: slice) -> Iterator[StreamBatch]:
        epoch, first, digest = start
        while True:
            given = 0
            for place, items, _ in self._epoch(epoch):
                if place.batch == first and place.digest != digest:
                    break
                given = place.batch
                if given > first:
                    # What this process doesn't decode is of use in place of an image alone.
                    if self._skips:
                        yield StreamBatch(place, items, share)
                    else:
                        yield StreamBatch(place, items[share], _ALL)
                    num_batches -= 1
                    if not num_batches:
                        return
            if given < first:
                raise ValueError(
                    f"`stream` gives other items up to batch {first} of epoch {epoch} than it gave "
                    "before, so a run can't go on there exactly. Let it give the same items in the "
                    "same order each time, or start again in another `checkpoint_dir`."
                )
            if not given:
                raise ValueError(
                    f"`stream` has no batch in epoch {epoch}. Is it one that can be read only "
                    "once, or of too few classes? Give more items, or train fewer steps."
                )
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[StreamBatch]:
        """All batches of an epoch."""
        return drawn_apart(lambda: self._batches(epoch), Stream.BATCHES, self.seed, epoch)

    def _batches(self, epoch: int) -> Iterator[StreamBatch]:
        draw = np.random.default_rng((self.seed, epoch))
        stream, feature = self._encoded()
        if hasattr(stream, "set_epoch"):
            stream.set_epoch(epoch)
        waiting: dict[int, list[StreamItem]] = {}
        number = count = left_out = digest = 0
        for position, item in enumerate(stream):
            entry = item_of(position, item, self._keys, self._ids, feature)
            digest = entry.digest(digest)
            waiting.setdefault(entry.label, []).append(entry)
            count += 1
            while count >= self.buffer_size:
                batch = self._draw(waiting, draw)
                if batch is not None:
                    count -= len(batch)
                    number += 1
                    yield StreamBatch(StreamPlace(epoch, number, digest), batch, _ALL)
                else:
                    self._drop_oldest(waiting)
                    count, left_out = count - 1, left_out + 1
        while (batch := self._draw(waiting, draw)) is not None:
            count -= len(batch)
            number += 1
            yield StreamBatch(StreamPlace(epoch, number, digest), batch, _ALL)
        if count + left_out:
            self._notices.say(
                "left out",
                f"{count + left_out:,} items of the stream are left out in epoch {epoch}: their "
                f"classes did not get {self.samples_per_class} items together in the buffer, or "
                "too few classes did at the end.",
            )

    def _encoded(self) -> tuple[Any, Any]:
        """The stream, and the feature that decodes its images if it is one of Hugging Face's."""
        key, stream = self._keys[0], self.stream
        feature: Any = (getattr(stream, "features", None) or {}).get(key)
        if type(feature).__name__ != "Image":
            return stream, None
        # Encoded, as the files are: they take less memory, and workers decode them.
        plain: Any = stream
        encoded = plain.with_format(None).cast_column(key, type(feature)(decode=False))
        return encoded, type(feature)()

    def _draw(
        self, waiting: dict[int, list[StreamItem]], draw: np.random.Generator
    ) -> list[StreamItem] | None:
        """Take a batch out of the buffer, or None where it has none."""
        ready = [label for label, items in waiting.items() if len(items) >= self.samples_per_class]
        if len(ready) < self.classes_per_batch:
            return None
        # Large classes rather, so that they don't fill the buffer in the end.
        sizes = np.array([len(waiting[label]) for label in ready])
        shares = sizes / sizes.sum()
        batch = []
        for place in draw.choice(len(ready), self.classes_per_batch, replace=False, p=shares):
            items = waiting[ready[place]]
            for _ in range(self.samples_per_class):
                batch.append(items.pop(int(draw.integers(len(items)))))
            if not items:
                del waiting[ready[place]]
        return batch

    def _drop_oldest(self, waiting: dict[int, list[StreamItem]]) -> None:
        """Make room by leaving out an item of a class that has too few."""
        rare = [items for items in waiting.values() if len(items) < self.samples_per_class]
        if not rare:
            raise ValueError(
                f"A full buffer of {self.buffer_size} items has {len(waiting)} classes, fewer than "
                f"`classes_per_batch` {self.classes_per_batch}. Raise `buffer_size`, or shuffle "
                "the stream, if it is sorted by class."
            )
        oldest = min(rare, key=lambda items: items[0].position)
        label = oldest.pop(0).label
        if not oldest:
            del waiting[label]
