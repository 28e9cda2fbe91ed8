"""A small tower, its images and losses, and a loop by hand, for tests of the exact step."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pairclip import (
    AllPairsCosineLoss,
    CosinePairLoss,
    Finetuner,
    History,
    PairSampler,
    VisionTower,
    load_tower,
)
from pairclip.towers import random_tower

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_metric_learning.losses import ArcFaceLoss, MultiSimilarityLoss
    from pytorch_metric_learning.samplers import MPerClassSampler as MPerClassSampler

NUM_CLASSES, DIMENSION, BATCH, RATE, STEPS = 4, 8, 32, 0.02, 4
LABELS = [number % NUM_CLASSES for number in range(64)]
LOSSES = ("linear", "squared", "hinge", "pairs", "multi-similarity", "arcface")


def to_tensor(image: Image.Image) -> Tensor:
    """Cheaper than an image processor, which would take most of the tests' time."""
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255 - 0.5


def pictures() -> np.ndarray:
    """One coarse pattern per class, with noise."""
    generator = np.random.default_rng(0)
    patterns = generator.normal(0, 1, (NUM_CLASSES, 8, 8, 3))
    noisy = patterns[LABELS] + generator.normal(0, 0.7, (len(LABELS), 8, 8, 3))
    return np.clip(noisy * 40 + 128, 0, 255).astype(np.uint8)


def targets() -> Tensor:
    """A row for each picture."""
    return torch.randn(len(LABELS), 5, generator=torch.Generator().manual_seed(3))


def naive_targets_loss(embeddings: Tensor, labels: Tensor, of_images: Tensor) -> Tensor:
    """`TargetSimilarityLoss` pair by pair."""
    first, second = torch.triu_indices(len(embeddings), len(embeddings), 1)
    cosines = [F.normalize(rows.double(), dim=1) for rows in (embeddings, of_images)]
    found, wanted = [(rows[first] * rows[second]).sum(dim=1) for rows in cosines]
    return (found - wanted).square().mean()


class Clip(nn.Module):
    """A CLIP encoder of one block, with something after it that a test may put there."""

    def __init__(self, extra: nn.Module, seed: int) -> None:
        super().__init__()
        sizes = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 1}
        self.clip = random_tower(**sizes, embedding_dim=DIMENSION, seed=seed).model
        self.extra = extra

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.extra(self.clip(pixels).image_embeds)
        return embeddings


def new_tower(extra: nn.Module | None = None, seed: int = 0) -> VisionTower:
    encoder = Clip(nn.Identity() if extra is None else extra, seed)
    return load_tower(encoder, image_processor=to_tensor)


def new_loss(name: str, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {
            "linear": lambda: AllPairsCosineLoss(),
            "squared": lambda: AllPairsCosineLoss(negatives="squared", positive_fraction=0.3),
            "hinge": lambda: AllPairsCosineLoss(negatives="hinge", margin=0.1),
            "pairs": lambda: CosinePairLoss(),
            "multi-similarity": lambda: MultiSimilarityLoss(),
            "arcface": lambda: ArcFaceLoss(NUM_CLASSES, DIMENSION),
        }[name]()


class Batches:
    """A batch sampler of the batches that it was given."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def shuffled_batches(size: int = BATCH) -> list[list[int]]:
    order = np.random.default_rng(7).permutation(len(LABELS)).tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]


def new_sampler(name: str) -> Any:
    if name == "pairs":
        return PairSampler(LABELS, BATCH // 2, seed=3)
    return Batches(shuffled_batches())


class Gradients:
    """An optimizer factory, plain SGD, that keeps the gradients of the first step."""

    def __init__(self, rate: float = RATE) -> None:
        self.rate = rate
        self.first: list[Tensor] = []

    def __call__(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=self.rate)

        def keep(*_: Any) -> None:
            if not self.first:
                self.first = [
                    torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters
                ]

        optimizer.register_step_pre_hook(keep)
        return optimizer


def fit(
    tower: VisionTower,
    loss: Any,
    sampler: Any,
    *,
    steps: int = 1,
    labels: Any = None,
    fitting: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[list[Tensor], list[Tensor], History]:
    """Gradients of the first step, the weights at the end, and the history of plain SGD."""
    gradients = Gradients()
    finetuner = Finetuner(
        tower,
        loss,
        **{
            "optimizer": gradients,
            "max_grad_norm": None,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            **settings,
        },
    )
    history = finetuner.fit(
        (pictures(), LABELS if labels is None else labels),
        sampler=sampler,
        max_steps=steps,
        **fitting or {},
    )
    return gradients.first, weights(tower, loss), history


def weights(*modules: Any) -> list[Tensor]:
    found = [module for module in modules if isinstance(module, nn.Module)]
    return [p.detach().clone() for module in found for p in module.parameters() if p.requires_grad]


def by_hand(
    tower: nn.Module,
    loss: Callable[..., Tensor],
    batches: Sequence[Sequence[int]],
    *,
    steps: int = 1,
    targets: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """What `fit` gives, from a bare loop over whole batches."""
    pixels = torch.stack([to_tensor(Image.fromarray(picture)) for picture in pictures()])
    labels = torch.tensor(LABELS)
    modules = [module for module in (tower, loss) if isinstance(module, nn.Module)]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for module in modules:
        module.train()
    first: list[Tensor] = []
    values = []
    for step in range(steps):
        batch = list(batches[step % len(batches)])
        beside = [] if targets is None else [targets[batch]]
        value = loss(tower(pixels[batch]), labels[batch], *beside)
        optimizer.zero_grad()
        value.backward()
        first = first or [p.grad.clone() for p in parameters if p.grad is not None]
        optimizer.step()
        values.append(value.item())
    return first, weights(*modules), values


def naive_loss(name: str) -> Callable[..., Tensor]:
    """The losses of pairclip written out pair by pair; those of other libraries as they are."""
    if name in ("multi-similarity", "arcface"):
        return new_loss(name)

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        unit = F.normalize(embeddings.double(), dim=1)
        if name == "pairs":
            first, second = torch.arange(0, len(unit), 2), torch.arange(1, len(unit), 2)
        else:
            first, second = torch.triu_indices(len(unit), len(unit), 1)
        cosine = (unit[first] * unit[second]).sum(dim=1)
        same = labels[first] == labels[second]
        if name == "squared":
            return 0.3 * (1 - cosine[same]).mean() + 0.7 * cosine[~same].square().mean()
        different = (cosine - 0.1).clamp(min=0) if name == "hinge" else cosine
        return torch.where(same, 1 - cosine, different).mean()

    return loss


def with_decay(loss: Callable[..., Tensor], tower: nn.Module) -> Callable[..., Tensor]:
    """A loss that also draws the weights of a tower to 0.1."""

    def decayed(embeddings: Tensor, labels: Tensor) -> Tensor:
        distances = [(parameter - 0.1).square().sum() for parameter in tower.parameters()]
        return loss(embeddings, labels) + 0.01 * sum(distances)

    return decayed


class Noise(nn.Module):
    """Multiplies by noise while training, and keeps it; or does so with the noise it was given."""

    def __init__(self, source: str, replayed: Tensor | None = None) -> None:
        super().__init__()
        self.source = source
        self.replayed = replayed
        self.with_gradient: list[Tensor] = []
        self.without_gradient: list[Tensor] = []

    def draw(self, shape: torch.Size) -> Tensor:
        if self.source == "torch":
            return torch.rand(shape)
        if self.source == "numpy":
            return torch.from_numpy(np.random.random(shape)).float()  # noqa: NPY002
        return torch.tensor([random.random() for _ in range(shape.numel())]).reshape(shape)

    def forward(self, embeddings: Tensor) -> Tensor:
        if not self.training:
            return embeddings
        noise = self.draw(embeddings.shape) if self.replayed is None else self.replayed
        (self.with_gradient if torch.is_grad_enabled() else self.without_gradient).append(noise)
        return embeddings * noise


def frozen_norm() -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(DIMENSION)
    generator = torch.Generator().manual_seed(1)
    norm.running_mean.copy_(torch.randn(DIMENSION, generator=generator))
    norm.running_var.copy_(torch.rand(DIMENSION, generator=generator) + 0.5)
    norm.requires_grad_(False)
    return norm


def norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors) ** 0.5)


def distance(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return norm([one.double() - other.double() for one, other in zip(tensors, others, strict=True)])


def assert_same_gradient(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The bounds of issue 4 for the gradients of a first step."""
    whole = norm(expected)
    assert whole > 0
    assert distance(found, expected) <= 1e-5 * whole
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert distance([one], [other]) <= 1e-5 * norm([other]) + 1e-6 * whole, number


def assert_same_training(
    found: Sequence[Tensor], expected: Sequence[Tensor], start: Sequence[Tensor]
) -> None:
    """The bound of issue 4 for the weights after ten steps."""
    moved = distance(expected, start)
    assert moved > 0
    assert distance(found, expected) <= 1e-4 * moved
