"""Batches of P classes times K images from a stream, through a bounded buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pairclip import _checks
from pairclip._randomness import Stream, random_state_kept, seed_all
from pairclip.datasets.notices import Notices
from pairclip.datasets.rgb import as_rgb


class StreamBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches from a stream that is larger than memory, or has no length, for your own loop.

    At most `buffer_size` items wait in a buffer, as the stream gave them. Each batch takes K random
    items of each of P random classes out of it. An epoch is one pass over the stream, and uses no
    item twice; those of classes that don't get K together, and those in the buffer when the stream
    ends and fewer than P classes have K, are left out and counted in one warning.

    In a ``DataLoader(batches, batch_size=None, num_workers=n)`` every worker reads the stream, and
    decodes only its share of the batches; the batches are the same for any number of workers. The
    workers don't tell which epoch they are in: call `start_at` before each but the first.

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

    Raises:
        ValueError: While iterating: if a full buffer has fewer than P classes of K items, an item
            has no label, or an image can't be read; it says which item.

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
    ) -> None:
        _checks.check_positive_int("classes_per_batch", classes_per_batch)
        _checks.check_positive_int("samples_per_class", samples_per_class)
        _checks.check_positive_int("buffer_size", buffer_size)
        if buffer_size < classes_per_batch * samples_per_class:
            raise ValueError(
                f"`buffer_size` must be at least the {classes_per_batch * samples_per_class} items "
                f"of a batch, got {buffer_size}. Many times as many mix classes better."
            )
        self.stream = stream
        self.preprocess = preprocess
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.buffer_size = buffer_size
        self.seed = seed
        self._ids = {name: id_ for id_, name in enumerate(class_names or ())}
        self._keys = image, label
        self._epoch = self._first_batch = 0
        self._notices = Notices()

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Go on at a batch of an epoch, both from 0, as if never stopped.

        The stream is read up to there again, without decoding, and must give the same items.

        Raises:
            ValueError: If the stream can be read only once.
        """
        self._epoch = _checks.check_count("epoch", epoch)
        self._first_batch = _checks.check_count("batch", batch)
        if isinstance(self.stream, Iterator) and (epoch or batch):
            raise ValueError(
                f"`stream` is a {type(self.stream).__name__} that can be read once, so no place in "
                "it can be found again. Give an iterable that starts anew, such as a dataset."
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch; the next iteration is of the next epoch."""
        epoch, first = self._epoch, self._first_batch
        self._epoch, self._first_batch = epoch + 1, 0
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, batch in enumerate(self._batches(epoch)):
            # As the loader takes turns from the first batch that is wanted.
            if number >= first and (number - first) % shares == share:
                yield self._decoded(batch, epoch)

    def _batches(self, epoch: int) -> Iterator[list[_Item]]:
        draw = np.random.default_rng((self.seed, epoch))
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        waiting: dict[int, list[_Item]] = {}
        count = left_out = 0
        for position, item in enumerate(self.stream):
            entry = self._item(position, item)
            waiting.setdefault(entry.label, []).append(entry)
            count += 1
            while count >= self.buffer_size:
                batch = self._draw(waiting, draw)
                if batch is not None:
                    count -= len(batch)
                    yield batch
                else:
                    self._drop_oldest(waiting)
                    count, left_out = count - 1, left_out + 1
        while (batch := self._draw(waiting, draw)) is not None:
            count -= len(batch)
            yield batch
        if count + left_out:
            self._notices.say(
                "left out",
                f"{count + left_out:,} items of the stream are left out in epoch {epoch}: their "
                f"classes did not get {self.samples_per_class} items together in the buffer, or "
                "too few classes did at the end.",
            )

    def _draw(
        self, waiting: dict[int, list[_Item]], draw: np.random.Generator
    ) -> list[_Item] | None:
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

    def _drop_oldest(self, waiting: dict[int, list[_Item]]) -> None:
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

    def _item(self, position: int, item: Any) -> _Item:
        if isinstance(item, Mapping):
            missing = [key for key in self._keys if key not in item]
            if missing:
                raise ValueError(
                    f"Item {position} of the stream has no {missing}, but {list(item)}. Name its "
                    "keys with `image=` and `label=`."
                )
            item = tuple(item[key] for key in self._keys)
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise TypeError(
                f"Item {position} of the stream must be a pair (image, label) or a dict, got "
                f"{type(item).__name__}."
            )
        image, label = item
        if isinstance(label, bytes):  # as a WebDataset has it
            label = label.decode()
        if isinstance(label, str):
            label = self._ids.get(label, int(label) if label.isdecimal() else label)
        if isinstance(label, (Tensor, np.ndarray, np.generic)):
            label = label.item()
        if not isinstance(label, int) or label == -1:
            raise ValueError(
                f"Item {position} of the stream must have a class id, or a name in `class_names`, "
                f"got {label!r}."
            )
        return _Item(position, int(label), image)

    def _decoded(self, batch: list[_Item], epoch: int) -> tuple[Tensor, Tensor]:
        values = []
        with random_state_kept():
            for item in batch:
                seed_all(Stream.ITEM, self.seed, epoch, item.position)
                try:
                    values.append(self.preprocess(as_rgb(item.image, say=self._notices.say)))
                except Exception as error:
                    raise ValueError(
                        f"Item {item.position} of the stream can't be read: {error}"
                    ) from error
        return torch.stack(values), torch.tensor([item.label for item in batch])


class _Item(NamedTuple):
    position: int
    label: int
    image: Any
