"""Image search: the embeddings of a collection, kept, saved and searched exactly or by FAISS."""

from pairclip.index.faiss import FaissIndex, search_recall
from pairclip.index.image_index import ImageIndex
from pairclip.index.match import Match

__all__ = ["FaissIndex", "ImageIndex", "Match", "search_recall"]
