"""A small CLIP tower with random weights, for tests and examples."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pairclip.towers.clip import CLIPTower
from pairclip.towers.loading import load_tower
from pairclip.towers.vision_tower import VisionTower


def random_tower(
    *,
    image_size: int = 16,
    patch_size: int = 8,
    width: int = 32,
    depth: int = 2,
    heads: int = 2,
    embedding_dim: int = 12,
    seed: int = 0,
    **settings: Any,
) -> VisionTower:
    """A CLIP tower with random weights, to try code on before a real one is loaded.

    Needs no network and next to no time. Its embeddings tell images apart, but know nothing.

    Args:
        image_size: Height and width of its images, in pixels; a multiple of `patch_size`.
        patch_size: Height and width of a patch, in pixels.
        width: Hidden size of a token; a multiple of `heads`.
        depth: Transformer blocks.
        heads: Attention heads of a block.
        embedding_dim: Size ``D`` of an embedding.
        seed: Decides the weights. The global generators stay as they are.
        **settings: Further settings of `transformers.CLIPVisionConfig`, such as
            ``attention_dropout=0.1``.

    Returns:
        The tower, in evaluation mode, with CLIP's preprocessing at `image_size`.

    Example:
        >>> import numpy as np
        >>> from pairclip import embed_images
        >>> from pairclip.towers import random_tower
        >>> tower = random_tower(embedding_dim=8)
        >>> embed_images(tower, np.zeros((3, 20, 30, 3), dtype=np.uint8)).shape
        torch.Size([3, 8])
    """
    sizes: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "projection_dim": embedding_dim,
    }
    config = CLIPVisionConfig(**{**sizes, **settings})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = CLIPVisionModelWithProjection(config).eval()
    return load_tower(model, image_processor=CLIPTower.default_image_processor(image_size))
