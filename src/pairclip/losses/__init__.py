"""Losses on the cosine similarity of pairs of embeddings."""

from pairclip.losses.all_pairs import (
    AllPairsCosineLoss,
    all_pairs_cosine_loss,
)
from pairclip.losses.forms import Negatives
from pairclip.losses.given_pairs import (
    CosinePairLoss,
    Reduction,
    cosine_pair_loss,
    on_pairs,
)
from pairclip.losses.preserving import PreservingLoss
from pairclip.losses.targets import (
    TargetSimilarityLoss,
    hierarchy_targets,
    multi_label_targets,
    target_similarity_loss,
)

__all__ = [
    "AllPairsCosineLoss",
    "CosinePairLoss",
    "Negatives",
    "PreservingLoss",
    "Reduction",
    "TargetSimilarityLoss",
    "all_pairs_cosine_loss",
    "cosine_pair_loss",
    "hierarchy_targets",
    "multi_label_targets",
    "on_pairs",
    "target_similarity_loss",
]
