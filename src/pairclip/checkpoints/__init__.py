"""Checkpoints of a fit: whole or absent, and checked before they are believed.

A checkpoint is a folder ``step-00000120`` with the trained weights and all other tensors
(safetensors), everything else that decides the rest of the run (JSON), and a manifest with the
size and SHA-256 of each file. It is written under another name, flushed to the disk and renamed,
so a killed process leaves the checkpoints that it had. No pickle is written or read.
"""

from pairclip.checkpoints.checkpoint import Checkpoint, best_checkpoint, newest_checkpoint
from pairclip.checkpoints.differences import differences
from pairclip.checkpoints.weights import copy_into, trained_tensors
from pairclip.checkpoints.writing import remove_leftovers, write_checkpoint

__all__ = [
    "Checkpoint",
    "best_checkpoint",
    "copy_into",
    "differences",
    "newest_checkpoint",
    "remove_leftovers",
    "trained_tensors",
    "write_checkpoint",
]
