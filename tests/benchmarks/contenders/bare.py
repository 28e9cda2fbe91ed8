"""Plain PyTorch, as one writes it by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from contenders.task import CLIP, MARGIN, Step, Work, adamw, dataset_of

if TYPE_CHECKING:
    from torch import Tensor


def loss(form: str) -> Callable[[Tensor, Tensor], Tensor]:
    import torch
    import torch.nn.functional as F

    negative: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda similarity: similarity,
        "squared": torch.square,
        "hinge": lambda similarity: (similarity - MARGIN).clamp_min(0),
    }

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        unit = F.normalize(embeddings)
        similarity = unit @ unit.T
        same = labels[:, None] == labels
        cost = torch.where(same, 1 - similarity, negative[form](similarity))
        return cost.triu(1).sum() / (len(labels) * (len(labels) - 1) / 2)

    return loss


def target_loss() -> Callable[[Tensor, Tensor], Tensor]:
    import torch.nn.functional as F

    def loss(embeddings: Tensor, targets: Tensor) -> Tensor:
        z, u = F.normalize(embeddings), F.normalize(targets)
        squares = (z @ z.T - u @ u.T).square()
        return squares.triu(1).sum() / (len(targets) * (len(targets) - 1) / 2)

    return loss


def normalize(embeddings: Tensor) -> Step:
    import torch
    import torch.nn.functional as F

    leaf = embeddings.requires_grad_()
    upstream = torch.ones_like(embeddings)

    def step() -> None:
        leaf.grad = None
        F.normalize(leaf).backward(upstream)

    return step


def train(work: Work) -> None:
    import torch
    from torch.utils.data import DataLoader

    tower, optimizer = work.module, adamw(work.module)
    tower.train()
    for pixels, labels in DataLoader(dataset_of(work), batch_sampler=work.batches):
        optimizer.zero_grad()
        work.loss(tower(pixels), labels).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), CLIP)
        optimizer.step()
        work.tick()
