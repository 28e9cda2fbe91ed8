"""Embeddings of images by a tower, divided among processes."""

from pairclip.embedding.embed import Precision, embed, embed_images
from pairclip.embedding.pixels import Pixels, are_images, open_images
from pairclip.embedding.processes import Together, lost_processes_named, waiting_said

__all__ = [
    "Pixels",
    "Precision",
    "Together",
    "are_images",
    "embed",
    "embed_images",
    "lost_processes_named",
    "open_images",
    "waiting_said",
]
