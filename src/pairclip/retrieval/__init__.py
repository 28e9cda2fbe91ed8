"""How well the nearest items are of a query's own class, and how far pairs of classes are apart."""

from pairclip.retrieval.metrics import (
    knn_accuracy,
    map_at_r,
    mean_average_precision,
    precision_at_k,
    r_precision,
    recall_at_k,
    retrieval_figures,
)
from pairclip.retrieval.one_pass import Outcome, outcome_of
from pairclip.retrieval.pair_metrics import PairSeparation, pair_separation
from pairclip.retrieval.table import METRICS, PAIR_METRICS, QUERY_METRICS, Metric

__all__ = [
    "METRICS",
    "PAIR_METRICS",
    "QUERY_METRICS",
    "Metric",
    "Outcome",
    "PairSeparation",
    "knn_accuracy",
    "map_at_r",
    "mean_average_precision",
    "outcome_of",
    "pair_separation",
    "precision_at_k",
    "r_precision",
    "recall_at_k",
    "retrieval_figures",
]
