"""Losses on the cosine similarity of pairs of embeddings."""

from pairclip.losses.all_pairs import (
    AllPairsCosineLoss as AllPairsCosineLoss,
    all_pairs_cosine_loss as all_pairs_cosine_loss,
)
from pairclip.losses.forms import Negatives as Negatives
from pairclip.losses.given_pairs import (
    CosinePairLoss as CosinePairLoss,
    Reduction as Reduction,
    cosine_pair_loss as cosine_pair_loss,
    on_pairs as on_pairs,
)

__all__ = [
    "AllPairsCosineLoss",
    "CosinePairLoss",
    "Negatives",
    "Reduction",
    "all_pairs_cosine_loss",
    "cosine_pair_loss",
    "on_pairs",
]
