"""Which batches a fit gets that was given no sampler."""

from __future__ import annotations

import warnings

from torch import Tensor

from pairclip import _checks
from pairclip.samplers.class_balanced import ClassBalancedSampler
from pairclip.samplers.pair_sampler import PairSampler


def default_sampler(
    labels: Tensor, batch_size: int, seed: int, *, pairs: bool
) -> PairSampler | ClassBalancedSampler:
    """Batches for a loss on pairs, or as many of each class as the classes allow."""
    _checks.check_positive_int("batch_size", batch_size)
    if pairs:
        return _pair_sampler(labels, batch_size, seed)
    shape = _equally_many(labels, batch_size)
    if shape is not None:
        return ClassBalancedSampler(labels, *shape, seed=seed)
    fallback = _pair_sampler(labels, batch_size, seed)
    warnings.warn(
        f"Batches of {batch_size} images can't hold equally many of several classes without "
        "leaving classes out, so they are made of pairs. Choose a `batch_size` that P classes "
        "times K images make up, with K at most the images of the smallest class, to avoid it.",
        stacklevel=3,
    )
    return fallback


def _pair_sampler(labels: Tensor, batch_size: int, seed: int) -> PairSampler:
    if batch_size % 2:
        raise ValueError(f"`batch_size` must be even for pairs, got {batch_size}.")
    if batch_size > 2 * len(labels):
        raise ValueError(
            f"`batch_size` must be at most two per image, got {batch_size} for {len(labels)} "
            "images. Lower it."
        )
    return PairSampler(labels, batch_size // 2, seed=seed)


def _equally_many(labels: Tensor, batch_size: int) -> tuple[int, int] | None:
    """P classes and K images that make up the batch: K from 4 on, else 3 or 2.

    None where such batches would leave out a class that has two images.
    """
    counts = labels.unique(return_counts=True)[1]
    counts = counts[counts > 1]
    for samples in [*range(4, batch_size // 2 + 1), 3, 2]:
        classes = batch_size // samples
        divides = classes * samples == batch_size
        if divides and 2 <= classes <= len(counts) and bool((counts >= samples).all()):
            return classes, samples
    return None


def batch_size_within(labels: Tensor, most: int, multiple_of: int = 1) -> int:
    """The largest batch of as many images of each class, at most `most` and all images.

    Half the images at least: where classes allow no such batch, all of them, of which pairs are
    made. It is even, and a multiple of what is wanted.
    """
    most = min(most, len(labels))
    step = multiple_of if multiple_of % 2 == 0 else 2 * multiple_of
    sizes = range(most - most % step, 0, -step)
    for size in sizes:
        if 2 * size >= most and _equally_many(labels, size) is not None:
            return size
    return max(sizes.start, step)
