"""What a frozen trunk gives for a dataset: computed once, kept in a file, trained on."""

from pairclip.features.cached import CachedFeatures
from pairclip.features.caching import cache_features

__all__ = ["CachedFeatures", "cache_features"]
