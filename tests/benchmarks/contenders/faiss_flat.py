"""FAISS's exact index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contenders.task import NEAREST

if TYPE_CHECKING:
    from torch import Tensor


def neighbors(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    import faiss as library
    import torch

    library.omp_set_num_threads(torch.get_num_threads())
    unit = torch.nn.functional.normalize(embeddings).numpy()
    index = library.IndexFlatIP(unit.shape[1])
    index.add(unit)
    scores, _ = index.search(unit, NEAREST + 1)
    return {"mean_score": float(scores[:, 1:].mean())}
