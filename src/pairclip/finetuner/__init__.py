"""The training loop: any tower, any loss on embeddings and labels."""

from pairclip.finetuner.finetuner import Finetuner
from pairclip.history import History

__all__ = ["Finetuner", "History"]
