"""Pictures of similarities and of training (needs matplotlib: ``pip install pairclip[plot]``)."""

from pairclip.plots.gallery import plot_retrieval
from pairclip.plots.heatmaps import plot_class_similarity, plot_similarity_matrix
from pairclip.plots.history import plot_history
from pairclip.plots.pair_histogram import plot_pair_histogram

__all__ = [
    "plot_class_similarity",
    "plot_history",
    "plot_pair_histogram",
    "plot_retrieval",
    "plot_similarity_matrix",
]
