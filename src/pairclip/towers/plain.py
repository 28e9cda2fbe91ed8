"""A tower around any module that comes with a preprocess."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pairclip.towers.modes import evaluating
from pairclip.towers.preprocess import Preprocess, grey_image
from pairclip.towers.vision_tower import VisionTower


def plain_tower(module: nn.Module, transform: Any) -> VisionTower:
    """Wrap `module`, and learn its sizes from one grey image."""
    if not callable(transform):
        raise TypeError(f"`image_processor` must be callable, got {type(transform).__name__}.")
    preprocess, name = Preprocess(transform), type(module).__name__
    pixel_values: Any = preprocess(grey_image(224, 224))
    shape = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else [0]
    if shape != [3, shape[-1], shape[-1]] or not pixel_values.is_floating_point():
        raise ValueError(
            "The preprocess must turn an image into a float tensor [3, S, S], got "
            f"{_describe(pixel_values)}. Resize to a square and end with `ToTensor()`."
        )
    weights = next(chain(module.parameters(), module.buffers()), pixel_values)
    try:
        with torch.no_grad(), evaluating(module):
            embeddings: Any = module(pixel_values[None].to(weights.device))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name} could not encode a grey image that its preprocess made {shape}: {error}"
        ) from error
    if not (isinstance(embeddings, Tensor) and embeddings.ndim == 2 and len(embeddings) == 1):
        raise ValueError(
            f"{name} must turn pixel values [B, 3, H, W] into a tensor of embeddings [B, D], got "
            f"{_describe(embeddings)} for one image. Wrap it in a module that returns them alone."
        )
    return VisionTower(module, preprocess, embedding_dim=embeddings.shape[1], image_size=shape[-1])


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
