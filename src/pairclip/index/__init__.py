"""Image search: the embeddings of a collection, kept, saved and searched exactly or by FAISS."""

from pairclip.index.faiss import FaissIndex
from pairclip.index.image_index import ImageIndex
from pairclip.index.match import Match
from pairclip.index.recall import search_recall

__all__ = ["FaissIndex", "ImageIndex", "Match", "search_recall"]
