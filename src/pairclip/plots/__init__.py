"""Pictures of similarities and of training (needs matplotlib: ``pip install pairclip[plot]``)."""

from pairclip.plots.history import plot_history
from pairclip.plots.pairs import plot_pair_histogram
from pairclip.plots.retrieval import plot_retrieval
from pairclip.plots.similarity import plot_class_similarity, plot_similarity_matrix

__all__ = [
    "plot_class_similarity",
    "plot_history",
    "plot_pair_histogram",
    "plot_retrieval",
    "plot_similarity_matrix",
]
