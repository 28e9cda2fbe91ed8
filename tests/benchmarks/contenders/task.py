"""What contenders are given, the same for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# Losses: the hinge's margin. Training: learning rate and largest norm of the gradient.
MARGIN = 0.2
RATE, CLIP = 1e-5, 1.0
# Samplers: pairs of a batch, or classes of a batch and items of each.
PAIRS, CLASSES_PER_BATCH, PER_CLASS = 64, 32, 4
BATCH = CLASSES_PER_BATCH * PER_CLASS
# Retrieval: neighbours of each query, and rows that a product computes at once.
NEAREST, BLOCK = 10, 512

Step = Callable[[], None]
# Makes the sampler of some labels; each call of the result is a pass that counts its indices.
Passes = Callable[[], int]
Factory = Callable[[Any], Passes]


class Objective(NamedTuple):
    """What a method minimises.

    Attributes:
        loss: Of embeddings and labels.
        matching: Share of matching pairs in batches of pairs; None for P x K.
        keep_share: Share of a batch that are images to keep.
    """

    loss: Any
    matching: float | None = None
    keep_share: float = 0.0


# Makes a method's objective, from the number of classes and the width of the embeddings.
Method = Callable[[int, int], Objective]


class Work(NamedTuple):
    """What all contenders do, and what they call after each step."""

    tower: Any
    module: Any
    loss: Any
    images: Any
    labels: list[int]
    batches: list[list[int]]
    tick: Callable[[], None]


def dataset_of(work: Work) -> Any:
    from PIL import Image
    from torch.utils.data import Dataset

    preprocess = work.tower.preprocess

    class Preprocessed(Dataset[Any]):
        def __len__(self) -> int:
            return len(work.labels)

        def __getitem__(self, index: int) -> Any:
            return preprocess(Image.fromarray(work.images[index])), work.labels[index]

    return Preprocessed()


def adamw(tower: Any) -> Any:
    import torch

    parameters = [p for p in tower.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)


def count_of(batches: Any) -> int:
    return sum(map(len, batches))


def backward_of(loss: Callable[[], Any], *leaves: Any) -> Step:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return step
