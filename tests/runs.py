"""A small fit to be changed, interrupted and resumed, as several tests do."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_metric_learning import losses as pml
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from pairclip import (
    AllPairsCosineLoss,
    Callback,
    Finetuner,
    VisionTower,
    load_tower,
)
from pairclip.callbacks import FitState

LOSS = AllPairsCosineLoss(negatives="squared", positive_fraction=0.5)


class Killed(BaseException):
    """Ends a fit where nothing catches it; `finally` clauses run, in which nothing may be saved."""


class At(Callback):
    """Does something after one step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._when = step
        self._action = action

    def on_step(self, fit: FitState) -> None:
        if fit.step == self._when:
            self._action()


def kill() -> None:
    raise Killed


def send(*numbers: int) -> Callable[[], None]:
    def action() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return action


def never() -> At:
    return At(-1, kill)


def photos() -> tuple[np.ndarray, list[int]]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3))
    labels = [0, 1, 2] * 8
    pixels[range(24), :, :, labels] //= 2
    return pixels.astype(np.uint8), labels


class Flipped(Dataset[tuple[Image.Image, int]]):
    """The photos, each of which is another one half of the time."""

    def __init__(self) -> None:
        self.pixels, self.targets = photos()
        self._flip = transforms.RandomHorizontalFlip()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._flip(Image.fromarray(self.pixels[index])), self.targets[index]


def plain_tower(*, size: int = 8, activation: nn.Module | None = None) -> VisionTower:
    """Small, with dropout and batch norm."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 16),
        nn.BatchNorm1d(16),
        activation or nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(16, size),
    )
    preprocess = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    return load_tower(module, image_processor=preprocess)


class Run:
    """A fit, to be changed before it is done."""

    count = 0

    def __init__(self, directory: Path | None = None) -> None:
        self.tower = plain_tower()
        self.loss: Any = LOSS
        self.data: Any = Flipped()
        self.finetuner: dict[str, Any] = {"learning_rate": 1e-3}
        self.fit: dict[str, Any] = {"batch_size": 6, "max_steps": 6}
        if directory is not None:
            self.fit |= {"checkpoint_dir": directory, "checkpoint_every": 2, "resume": True}

    def go(self, *more: Callback) -> Any:
        # Nothing of a run may follow from what the program drew before it.
        Run.count += 1
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(Run.count)
        settings = {**self.finetuner, "callbacks": [*self.finetuner.get("callbacks", ()), *more]}
        return Finetuner(self.tower, self.loss, **settings).fit(self.data, **self.fit)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert value.equal(found.state_dict()[name]), name


def arcface() -> nn.Module:
    torch.manual_seed(5)
    return pml.ArcFaceLoss(num_classes=3, embedding_size=8)
