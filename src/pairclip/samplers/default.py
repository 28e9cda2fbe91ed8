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
    balanced = _balanced_sampler(labels, batch_size, seed)
    if balanced is not None:
        return balanced
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


def _balanced_sampler(labels: Tensor, batch_size: int, seed: int) -> ClassBalancedSampler | None:
    """P classes times K images that make up the batch: K from 4 on, else 3 or 2.

    None where such batches would leave out a class that has two images.
    """
    counts = labels.unique(return_counts=True)[1]
    counts = counts[counts > 1]
    for samples in [*range(4, batch_size // 2 + 1), 3, 2]:
        classes = batch_size // samples
        divides = classes * samples == batch_size
        if divides and 2 <= classes <= len(counts) and bool((counts >= samples).all()):
            return ClassBalancedSampler(labels, classes, samples, seed=seed)
    return None
