"""What may be searched for, and by which tower."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pairclip import _checks
from pairclip.embedding import embed, open_images
from pairclip.towers import VisionTower
from pairclip.towers.vision_tower import check_embeds

# Values per weight that are looked at before each search, to notice a tower that was trained.
_SAMPLED = 64


class Searcher:
    """Makes embeddings of queries, by the tower that an index was built with or none."""

    def __init__(self, tower: VisionTower | None, fingerprint: str) -> None:
        if tower is not None:
            check_embeds(tower)
        self.tower = tower
        self.fingerprint = fingerprint
        self._sample: Tensor | None = None

    def embeddings_of(self, queries: Any, size: int | None = None) -> Tensor:
        """Rows ``[Q, size]`` on the CPU of images, or of embeddings as they are."""
        if are_embeddings(queries):
            rows = queries[None] if queries.ndim == 1 else queries
            embeddings = _checks.as_embeddings("queries", rows, finite=True).detach().cpu()
        else:
            images = open_images([queries] if is_one(queries) else queries)
            # Alone, since it is one process of several that is asked.
            embeddings = embed(self.checked_tower(), images, alone=True)
        if size is not None and embeddings.shape[1] != size:
            raise ValueError(
                f"`queries` must have the embedding size of the index, {size}, got "
                f"{embeddings.shape[1]}."
            )
        return embeddings

    def checked_tower(self) -> VisionTower:
        """The tower; a ValueError if there is none, or it is not what the index was built with."""
        if self.tower is None:
            raise ValueError(
                "This index was loaded without a tower, so it can be searched by embeddings only. "
                "Give it the one it was built with: `ImageIndex.load(folder, tower)`."
            )
        self.check_tower()
        return self.tower

    def check_tower(self) -> None:
        """Raise if the tower is not, or no longer, the one that the index was built with."""
        if self.tower is None:
            return
        # A tower that is tuned in place after the index was built, as in a notebook, would be
        # searched with silently. Version counters of tensors don't show it: fused optimizers
        # don't count.
        sample = _sample_of(self.tower)
        if self._sample is not None and torch.equal(sample, self._sample):
            return
        fingerprint = self.tower.fingerprint()
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"`tower` is another one than the index was built with, or was trained since: its "
                f"fingerprint is {fingerprint[:12]}..., that of the index "
                f"{self.fingerprint[:12]}... Their embeddings don't compare. Build the index again "
                "with this tower, or load the tower that built it."
            )
        self._sample = sample


def is_one(queries: Any) -> bool:
    """Whether it is one query: an image or an embedding, rather than several."""
    if isinstance(queries, (Image.Image, str, os.PathLike)):
        return True
    return getattr(queries, "ndim", 4) < (2 if are_embeddings(queries) else 4)


def are_embeddings(queries: Any) -> bool:
    """Whether it is a floating-point matrix or vector, which no image of ours is."""
    if getattr(queries, "ndim", 0) not in (1, 2):
        return False
    if isinstance(queries, Tensor):
        return queries.is_floating_point()
    return isinstance(queries, np.ndarray) and queries.dtype.kind == "f"


def _sample_of(tower: VisionTower) -> Tensor:
    """Values spread over every weight of a tower, float64 on the CPU."""
    sampled = [
        weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)].double().cpu()
        for weight in [*tower.parameters(), *tower.buffers()]
    ]
    return torch.cat([torch.zeros(0, dtype=torch.float64, device="cpu"), *sampled])
