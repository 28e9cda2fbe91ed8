"""Image search: the embeddings of a collection, kept, saved and searched exactly."""

from pairclip.index.image_index import ImageIndex, Match

__all__ = ["ImageIndex", "Match"]
