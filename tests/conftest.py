"""Small towers and images that several tests share."""

import os

# Each core has a test process of its own; and a fork of a process whose threads have worked hangs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from pairclip import VisionTower
from pairclip.towers import random_tower


@pytest.fixture
def tower() -> VisionTower:
    torch.manual_seed(0)  # for what a test draws itself
    return random_tower()


@pytest.fixture
def images() -> tuple[np.ndarray, list[int]]:
    """48 noisy images of 3 classes, each with a grating of its own."""
    generator = np.random.default_rng(0)
    labels = [0, 1, 2] * 16
    grid = np.arange(16)
    gratings = [
        np.sin(grid)[:, None] + 0 * grid,
        np.sin(grid)[None] + 0 * grid[:, None],
        np.sin(grid[:, None] + grid),
    ]
    noisy = np.stack([gratings[label] for label in labels])
    noisy = noisy + generator.normal(0, 0.7, noisy.shape)
    pixels = np.clip(noisy * 50 + 128, 0, 255).astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=3), labels
