"""Batches of pairs, of which a set fraction is of one class."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from pairclip import _checks
from pairclip._randomness import SamplerStream, sampler_generator
from pairclip.samplers.decks import Indices, deal, group
from pairclip.samplers.epoch import EpochSampler

# Pairs whose partners are drawn at once: enough for NumPy's speed, little memory.
_PAIRS_AT_ONCE = 1 << 16


class PairSampler(EpochSampler):
    """Batches of pairs, of which a set fraction is of one class.

    A batch is ``[a0, b0, a1, b1, ...]``; `split` takes its embeddings and labels apart again. In
    an epoch every item is an anchor ``a`` once; the places that are then left in the last batch
    are filled with items that anchor again. The partner ``b`` of a matching pair is drawn evenly
    from the rest of the anchor's class, that of another pair evenly from all items of other
    classes. No pair joins an item with itself, and no item anchors twice in one batch.

    An item that is alone in its class anchors non-matching pairs only. Where there are more such
    items than such pairs, some are left out, others in each epoch.

    The epoch is a function of (seed, epoch). An iteration that was broken off goes on with the
    next batch; `set_epoch` rewinds.

    Args:
        labels: Class of each item, ``[N]`` integers.
        pairs_per_batch: Pairs in each batch, at most N.
        positive_fraction: Share of matching pairs in each batch, in ``[0, 1]``, rounded to
            ``floor(positive_fraction * pairs_per_batch + 0.5)`` pairs.
        num_batches: Batches of an epoch; None for ``ceil(N / pairs_per_batch)``. With fewer, the
            items take turns over the epochs.
        class_balanced: Whether all classes are anchors equally often (up to one), instead of all
            items, and non-matching partners come from all other classes equally often. Items
            may then anchor repeatedly, in one batch too.
        seed: Not negative.

    Raises:
        ValueError: If an argument is out of range, or the labels can't form such pairs.
        TypeError: If labels or counts are not integers.

    Warns:
        UserWarning: Once, with the number of classes that have one item.

    Example:
        >>> from pairclip import PairSampler
        >>> labels = [0, 0, 0, 1, 1, 1]
        >>> sampler = PairSampler(labels, pairs_per_batch=2)
        >>> len(sampler)
        3
        >>> for batch in sampler:
        ...     a, b = PairSampler.split(batch)
        ...     print(sum(labels[i] == labels[j] for i, j in zip(a, b)), "of", len(a), "match")
        1 of 2 match
        1 of 2 match
        1 of 2 match
    """

    def __init__(
        self,
        labels: Any,
        pairs_per_batch: int,
        *,
        positive_fraction: float = 0.5,
        num_batches: int | None = None,
        class_balanced: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self._groups = group(labels)
        _checks.check_positive_int("pairs_per_batch", pairs_per_batch)
        _checks.check_in("[0, 1]", "positive_fraction", positive_fraction)
        self.pairs_per_batch = int(pairs_per_batch)
        self.positive_fraction = float(positive_fraction)
        self.class_balanced = class_balanced
        self._matching = int(positive_fraction * pairs_per_batch + 0.5)
        num_items = len(self._groups.order)
        self._set_num_batches(num_batches, num_items, self.pairs_per_batch)

        self._alone_classes = np.flatnonzero(self._groups.counts == 1)
        self._paired_classes = np.flatnonzero(self._groups.counts > 1)
        self._alone = self._groups.order[self._groups.starts[self._alone_classes]]
        self._refuse_the_impossible()
        self._warn_of_alone()

    @property
    def batch_size(self) -> int:
        """Images in each batch, two per pair."""
        return 2 * self.pairs_per_batch

    @staticmethod
    def split(batch: Any) -> tuple[Any, Any]:
        """Take the two sides of a batch's pairs apart.

        Args:
            batch: Indices, embeddings or labels of a batch, shape ``[2 * pairs_per_batch, ...]``.

        Returns:
            The anchors and their partners, each ``[pairs_per_batch, ...]``.

        Example:
            >>> import torch
            >>> from pairclip import PairSampler
            >>> PairSampler.split(torch.arange(6))
            (tensor([0, 2, 4]), tensor([1, 3, 5]))
        """
        if len(batch) % 2:
            raise ValueError(f"`batch` must hold pairs, an even number of rows, got {len(batch)}.")
        return batch[0::2], batch[1::2]

    def _refuse_the_impossible(self) -> None:
        pairs, matching, fraction = self.pairs_per_batch, self._matching, self.positive_fraction
        num_items = len(self._groups.order)
        if pairs > num_items:
            raise ValueError(
                f"`pairs_per_batch` must be at most the number of items, got {pairs} for "
                f"{num_items} items."
            )
        if 0 < fraction < 1 and matching in (0, pairs):
            raise ValueError(
                f"`positive_fraction` {fraction} of {pairs} pairs per batch rounds to {matching}. "
                "Take more pairs per batch, or a fraction of exactly 0 or 1."
            )
        if matching < pairs and len(self._groups.counts) < 2:
            raise ValueError(
                "`labels` has one class alone, so no pair is of different classes. Add another "
                "class, or set `positive_fraction` to 1."
            )
        num_paired = num_items - len(self._alone)
        if matching and not num_paired:
            raise ValueError(
                "`labels` has no class with two items, so no pair is of one class. Check that "
                "they are class ids, or set `positive_fraction` to 0."
            )
        if matching > num_paired and not self.class_balanced:
            raise ValueError(
                f"{matching} matching pairs per batch need as many anchors, but only {num_paired} "
                "items have another one in their class. Lower `pairs_per_batch` or "
                "`positive_fraction`, or set `class_balanced=True`, which repeats anchors."
            )

    def _alone_before(self, epoch: int) -> int:
        """Anchors before an epoch that were lone items: their share, or what batches allow."""
        fewest, most = self._alone_per_batch()
        per_epoch = max(self._alone_share(), Fraction(self._num_batches * fewest))
        return int(epoch * min(per_epoch, Fraction(self._num_batches * most)))

    def _alone_share(self) -> Fraction:
        """Anchors of an epoch that lone items would be if all items, or classes, came alike."""
        if self.class_balanced:
            alone, all_of_them = len(self._alone_classes), len(self._groups.counts)
        else:
            alone, all_of_them = len(self._alone), len(self._groups.order)
        return Fraction(self._num_batches * self.pairs_per_batch * alone, all_of_them)

    def _alone_per_batch(self) -> tuple[int, int]:
        """Fewest and most anchors of a batch that are the only item of their class."""
        most = self.pairs_per_batch - self._matching
        if not len(self._alone):
            return 0, 0
        if not len(self._paired_classes):
            return most, most
        if self.class_balanced:
            return 0, most
        num_paired = len(self._groups.order) - len(self._alone)
        return max(0, self.pairs_per_batch - num_paired), min(most, len(self._alone))

    def _warn_of_alone(self) -> None:
        if not self._matching or not len(self._alone):
            return
        excess = ""
        if self._num_batches * self._alone_per_batch()[1] < self._alone_share():
            excess = " There are too few such pairs, so these items come less often than others."
            left_out = len(self._alone) - self._alone_before(1)
            whole_epoch = self._num_batches * self.pairs_per_batch >= len(self._groups.order)
            if whole_epoch and left_out > 0 and not self.class_balanced:
                excess = (
                    f" There are too few such pairs, so {left_out} of these items are left out of "
                    "each epoch, others each time."
                )
        warnings.warn(
            f"{len(self._alone)} of {len(self._groups.counts)} classes have one item: it anchors "
            f"pairs of different classes only.{excess}",
            stacklevel=3,
        )

    def _epoch_batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        anchors = self._anchors(epoch)
        batches_at_once = max(1, _PAIRS_AT_ONCE // self.pairs_per_batch)
        for chunk in range(first // batches_at_once, -(-len(anchors) // batches_at_once)):
            start = chunk * batches_at_once
            rng = sampler_generator(SamplerStream.PARTNERS, self._seed, epoch, chunk)
            pairs = self._with_partners(anchors[start : start + batches_at_once], rng)
            yield from pairs[max(0, first - start) :].tolist()

    def _anchors(self, epoch: int) -> Indices:
        """Anchors of an epoch, ``[num_batches, pairs]``; those of matching pairs come first."""
        rng = sampler_generator(SamplerStream.ANCHORS, self._seed, epoch)
        batches, pairs = self._num_batches, self.pairs_per_batch
        alone_before = self._alone_before(epoch)
        alone_places = self._alone_before(epoch + 1) - alone_before
        paired_before = epoch * batches * pairs - alone_before
        alone_per_batch = self._spread(alone_places, rng)
        paired_per_batch = pairs - alone_per_batch
        if self.class_balanced:
            alone = self._balanced_anchors(self._alone_classes, alone_places, alone_before, rng)
            paired = self._balanced_anchors(
                self._paired_classes, batches * pairs - alone_places, paired_before, rng
            )
        else:
            alone = deal(
                self._alone, alone_per_batch, rng, seed=self._seed, dealt_before=alone_before
            )
            paired_items = self._groups.order
            if len(self._alone):
                paired_items = paired_items[
                    self._groups.counts[self._groups.class_of[paired_items]] > 1
                ]
            paired = deal(
                paired_items, paired_per_batch, rng, seed=self._seed, dealt_before=paired_before
            )
        anchors = np.empty((batches, pairs), self._groups.order.dtype)
        is_paired = np.arange(pairs) < paired_per_batch[:, None]
        anchors[is_paired] = paired
        anchors[~is_paired] = alone
        return anchors

    def _spread(self, places: int, rng: np.random.Generator) -> Indices:
        """Divide the epoch's places for lone items among its batches, at random.

        The last batch gets the average, so that all items which anchor again fit into it.
        """
        fewest, most = self._alone_per_batch()
        others = self._num_batches - 1
        last = places // self._num_batches
        per_batch = np.full(others, fewest, np.int64)
        free = others * (most - fewest)
        if free:
            more = places - last - others * fewest
            chosen = rng.choice(free, more, replace=False, shuffle=False)
            per_batch += np.bincount(chosen % others, minlength=others)
        return np.append(per_batch, places - per_batch.sum())

    def _balanced_anchors(
        self, classes: Indices, count: int, before: int, rng: np.random.Generator
    ) -> Indices:
        """`count` anchors, evenly from the classes and within each from its shuffled items."""
        groups = self._groups
        small = groups.order.dtype
        drawn = deal(
            classes.astype(small),
            np.array([count]),
            rng,
            seed=self._seed,
            dealt_before=before,
            distinct=False,
        )
        rng.shuffle(drawn)
        by_class = np.argsort(drawn, kind="stable").astype(small)
        drawn_of = np.bincount(drawn, minlength=len(groups.counts))
        turn: Any = np.empty(count, small)
        turn[by_class] = np.arange(count, dtype=small)
        turn -= (np.cumsum(drawn_of) - drawn_of).astype(small)[drawn]
        del by_class
        turn %= groups.counts[drawn]
        turn += groups.starts[drawn]
        shuffled = rng.permutation(np.arange(len(groups.order), dtype=small))
        anchors: Indices = shuffled[np.argsort(groups.class_of[shuffled], kind="stable")][turn]
        return anchors

    def _with_partners(self, anchors: Indices, rng: np.random.Generator) -> Indices:
        """Pairs ``[batches, 2 * pairs]`` of the anchors and partners drawn for them, shuffled."""
        pairs = np.empty((*anchors.shape, 2), np.int64)
        pairs[..., 0] = anchors
        pairs[:, : self._matching, 1] = self._matching_partners(anchors[:, : self._matching], rng)
        pairs[:, self._matching :, 1] = self._other_partners(anchors[:, self._matching :], rng)
        places = rng.permuted(
            np.broadcast_to(np.arange(self.pairs_per_batch), anchors.shape), axis=1
        )
        shuffled = np.take_along_axis(pairs, places[..., None], axis=1)
        return shuffled.reshape(len(pairs), -1)

    def _matching_partners(self, anchors: Indices, rng: np.random.Generator) -> Indices:
        groups = self._groups
        of_class = groups.class_of[anchors]
        starts = groups.starts[of_class]
        drawn = starts + rng.integers(0, np.maximum(groups.counts[of_class] - 1, 1))
        # The class's last item stands in for the anchor, which is never its own partner.
        partners: Indices = groups.order[drawn]
        last = groups.order[starts + groups.counts[of_class] - 1]
        partners[partners == anchors] = last[partners == anchors]
        return partners

    def _other_partners(self, anchors: Indices, rng: np.random.Generator) -> Indices:
        groups = self._groups
        of_class = groups.class_of[anchors]
        starts, counts = groups.starts[of_class], groups.counts[of_class]
        if self.class_balanced:
            other = rng.integers(0, len(groups.counts) - 1, anchors.shape)
            other += other >= of_class
            drawn = groups.starts[other] + rng.integers(0, groups.counts[other])
        else:
            drawn = rng.integers(0, np.maximum(len(groups.order) - counts, 1))
            drawn += np.where(drawn >= starts, counts, 0)
        partners: Indices = groups.order[drawn]
        return partners
