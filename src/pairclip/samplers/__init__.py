"""Batch samplers whose epoch is defined: pairs, classes times samples, and these within groups."""

from pairclip.samplers.class_balanced import ClassBalancedSampler as ClassBalancedSampler
from pairclip.samplers.default import default_sampler as default_sampler
from pairclip.samplers.group_sampler import GroupSampler as GroupSampler
from pairclip.samplers.pair_sampler import PairSampler as PairSampler

__all__ = ["ClassBalancedSampler", "GroupSampler", "PairSampler", "default_sampler"]
