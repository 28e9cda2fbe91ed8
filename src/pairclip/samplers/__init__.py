"""Batch samplers whose epoch is defined: pairs, classes times samples, and these within groups."""

from pairclip.samplers.class_balanced import ClassBalancedSampler
from pairclip.samplers.default import batch_size_within, default_sampler
from pairclip.samplers.group_sampler import GroupSampler
from pairclip.samplers.pair_sampler import PairSampler

__all__ = [
    "ClassBalancedSampler",
    "GroupSampler",
    "PairSampler",
    "batch_size_within",
    "default_sampler",
]
