"""Batch samplers whose epoch is defined: for pairs, and for classes times samples."""

from pairclip.samplers.class_balanced import ClassBalancedSampler as ClassBalancedSampler
from pairclip.samplers.default import default_sampler as default_sampler
from pairclip.samplers.pair_sampler import PairSampler as PairSampler

__all__ = ["ClassBalancedSampler", "PairSampler", "default_sampler"]
