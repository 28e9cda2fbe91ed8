"""How well a tower keeps classes apart: metrics before and after, side by side."""

from pairclip.evaluation.comparison import Change
from pairclip.evaluation.evaluating import evaluate, evaluate_embeddings
from pairclip.evaluation.histogram import PairHistogram
from pairclip.evaluation.result import Evaluation
from pairclip.evaluation.suspects import Suspicion, near_duplicates, suspect_labels
from pairclip.evaluation.thresholds import Threshold, choose_threshold

__all__ = [
    "Change",
    "Evaluation",
    "PairHistogram",
    "Suspicion",
    "Threshold",
    "choose_threshold",
    "evaluate",
    "evaluate_embeddings",
    "near_duplicates",
    "suspect_labels",
]
