"""Small towers and images that several tests share."""

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from pairclip import VisionTower, load_tower


@pytest.fixture
def tower() -> VisionTower:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return load_tower(CLIPVisionModelWithProjection(config), image_processor=processor)


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
